"""Configuration of a training run, and the command lines of the other programs. Loads without torch and fairseq."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from common.experiments.config import (
    REQUIRED,
    Config,
    FlagParser,
    derived,
    flag,
    natural,
    non_negative,
    override,
    positive_int,
    share,
)
from common.experiments.files import ROOT

PLUGIN = Path(__file__).resolve().parent / "plugin"
TASK = "factorized_translation"
CRITERIONS = {name: f"{name}_with_frobenius_decay" for name in ("cross_entropy", "label_smoothed_cross_entropy")}

_DROPOUTS = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "transformer_small": {"embed_dim": 256, "ffn_dim": 1024, "layers": 2, "heads": 4, **_DROPOUTS},
    "transformer_base": {"embed_dim": 512, "ffn_dim": 2048, "layers": 6, "heads": 8, **_DROPOUTS},
    "transformer_big": {"embed_dim": 1024, "ffn_dim": 4096, "layers": 6, "heads": 16, **_DROPOUTS},
    "transformer_iwslt": {"embed_dim": 512, "ffn_dim": 1024, "layers": 6, "heads": 4, **_DROPOUTS},
}
DEFAULT_DECAY = 1e-4  # strength of Frobenius decay unless a flag gives one

# The learning rates of the released scripts. They suit nag; another optimizer needs its own learning rate.
_NAG = {"lr": 0.25, "warmup_init_lr": 0.25}
# Fields of the configuration that fairseq has as flags of the same names: flags with values, and switches.
_PASSED = (
    *("arch", "optimizer", "lr", "lr_scheduler", "clip_norm", "max_tokens", "max_update", "weight_decay", "seed"),
    *("embed_dim", "ffn_dim", "layers", "heads", "dropout", "attention_dropout", "activation_dropout"),
    *("rank_scale", "init", "frobenius_decay", "distributed_world_size"),
)
_SWITCHES = ("spectral_quekey", "spectral_outval", "wd2fd", "wd2fd_quekey", "wd2fd_outval", "cpu")
# Flags of fairseq that do not change the result, and flags that this program sets itself or relies on.
_HARMLESS = {
    "--num-workers", "--log-interval", "--tensorboard-logdir", "--wandb-project", "--keep-last-epochs",
    "--no-epoch-checkpoints", "--no-progress-bar", "--device-id", "--distributed-port", "--distributed-init-method",
    "--distributed-rank", "--distributed-no-spawn", "--distributed-backend",
}  # fmt: skip
_PLAIN_DDP = ("pytorch_ddp", "c10d", "legacy_ddp", "no_c10d")  # values of --ddp-backend that compute the same result
_OWN = {
    "--task", "--user-dir", "--restore-file", "--checkpoint-suffix", "--valid-subset", "--no-save", "--no-last-checkpoints",
    "--log-format", "--log-file", "--left-pad-target", "--rebuild-batches", "-s", "-t", "--source-lang", "--target-lang",
    "--curriculum",  # fairseq does not resume it exactly
}  # fmt: skip

# By default fairseq leaves out a last batch whose size is not a multiple of 8: it translates 496 of 500 test sentences.
WHOLE = ("--required-batch-size-multiple", "1")


def rank_scale(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], where 0 and 1 factorize nothing, got {text}")
    return value


def _size(flags: Sequence[str], text: str) -> Any:
    return flag(None, *flags, type=positive_int, help=f"{text} (default: the architecture's)")


@dataclass(kw_only=True)
class ModelConfig(Config):
    """The model and its decay. train.py and fairseq-train with the plugin share these flags."""

    program: ClassVar[str] = "transformer_iwslt"
    group: ClassVar[str | None] = "model"

    embed_dim: int = _size(("--embed-dim", "--hidden-size"), "dimensions of embeddings and of hidden states")
    ffn_dim: int = _size(("--ffn-dim", "--filter-size"), "hidden dimensions of feed-forward layers")
    layers: int = _size(("--layers", "--num-layers"), "number of layers of the encoder and of the decoder")
    heads: int = _size(("--heads", "--num-head"), "attention heads")
    dropout: float = flag(None, type=share, help="(default: the architecture's)")
    attention_dropout: float = flag(None, type=share, help="(default: the architecture's)")
    activation_dropout: float = flag(None, type=share, help="(default: the architecture's)")
    rank_scale: float = flag(0.0, type=rank_scale, help="rank as a share of the full rank; 0 is dense")
    init: str = flag(
        None, choices=("regular", "spectral", "norm-matched"), help="initialization of factorized layers (default: regular)"
    )
    spectral: bool = flag(False, changes_result=False, help="short for --init spectral")
    spectral_quekey: bool = flag(False, help="spectral initialization of query-key products")
    spectral_outval: bool = flag(False, help="spectral initialization of output-value products")
    wd2fd: bool = flag(False, help="Frobenius decay in place of weight decay on factorized layers")
    wd2fd_quekey: bool = flag(False, help="Frobenius decay in place of weight decay on each head's query-key product")
    wd2fd_outval: bool = flag(False, help="Frobenius decay in place of weight decay on each head's output-value product")
    frobenius_decay: float = flag(
        None,
        type=non_negative,
        metavar="D",
        help=f"strength of the Frobenius decay (default: --weight-decay if that is positive, else {DEFAULT_DECAY:g})",
    )


@dataclass(kw_only=True)
class TranslationConfig(ModelConfig):
    """A run of transformer_iwslt/train.py. ``fairseq`` holds flags passed on to fairseq, ``warnings`` messages to print."""

    description: ClassVar[str] = (
        "Train a full or factorized Transformer with fairseq. Flags of fairseq that are not listed here are passed on to it. "
        "The defaults are the recipe of the paper's released scripts."
    )
    group: ClassVar[str | None] = "training"

    data: Path = flag(
        REQUIRED,
        "data",
        group="",
        type=Path,
        metavar="DATA",
        changes_result=False,
        help="folder that prepare.py wrote; give it before all flags",
    )
    arch: str = flag(
        "transformer_small",
        "-a",
        "--arch",
        group=ModelConfig.group,
        choices=list(ARCHITECTURES),
        help="sizes of the Transformer",
    )
    dropout: float = override(ModelConfig, "dropout", 0.2)
    optimizer: str = flag("nag", help="an optimizer of fairseq")
    lr: float = flag(None, "--lr", "--learning-rate", type=non_negative, help="learning rate (default: 0.25 with nag)")
    lr_scheduler: str = flag("inverse_sqrt", help="a learning-rate scheduler of fairseq")
    warmup_init_lr: float | None = flag(
        None, type=non_negative, help="first learning rate of the warm-up (default for inverse_sqrt: 0.25 with nag, else 0)"
    )
    warmup_updates: int | None = flag(
        None,
        type=natural,
        before=4000,
        metavar="N",
        help="updates during which the learning rate rises (default: 4000 for inverse_sqrt, fairseq's for other schedulers)",
    )
    clip_norm: float = flag(0.1, type=non_negative, help="largest norm of the gradient; 0 does not clip")
    weight_decay: float = flag(
        0.0, "--weight-decay", "--wd", type=non_negative, help="weight decay of what Frobenius decay does not cover"
    )
    criterion: str = flag(
        "label_smoothed_cross_entropy", choices=list(CRITERIONS), help="loss, to which Frobenius decay is added"
    )
    label_smoothing: float = flag(
        None, type=share, before=0.1, help="label smoothing of label_smoothed_cross_entropy (default: 0.1)"
    )
    smoothed_over: str = flag(
        None,
        choices=("all", "others"),
        before="others",
        help="words over which --label-smoothing is spread: all, as in the released code, or all others than the correct one, "
        "as in current fairseq (default: all)",
    )
    batches: str = flag(
        "each-epoch",
        choices=("each-epoch", "once"),
        before="once",
        help="when sentences are grouped into batches: again in each epoch, as in the released code, or once, as in current "
        "fairseq; the order of the batches is drawn in each epoch in both cases",
    )
    max_tokens: int = flag(4000, type=positive_int, metavar="N", help="tokens per batch, counted on the longer side")
    max_update: int = flag(100_000, type=positive_int, metavar="N", help="updates in the schedule")
    max_steps: int | None = flag(None, type=positive_int, metavar="N", help="stop after N updates in total")
    distributed_world_size: int = flag(1, type=positive_int, metavar="N", help="number of GPUs; batches grow with it")
    seed: int = flag(1, type=natural, changes_result=False, help="seed of initialization, order and dropout")
    cpu: bool = flag(False, changes_result=False, help="train on the CPU even if there is a GPU")

    save_dir: Path | None = flag(
        None,
        group="run",
        type=Path,
        changes_result=False,
        help="directory of the run (default: results/<program>/<row or run>/<configuration>)",
    )
    generate: bool = flag(
        False, group="run", changes_result=False, help="after training, translate the test set as generate.py does by default"
    )
    resume: str = flag("auto", group="run", choices=("auto",), changes_result=False, help="resume an unfinished run")
    dry_run: bool = flag(False, group="run", changes_result=False, help="build the model, print it as JSON and stop")
    row: str | None = flag(None, group="run", changes_result=False, help="name of the table row this run is for")
    row_config: str | None = flag(
        None,
        group="run",
        changes_result=False,
        help="hash of the row's configuration; a result with another hash belongs to no row",
    )
    fairseq: list[str] = derived([])
    warnings: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> Self:
        parser = cls.parser()
        words = [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
        args, fairseq = parser.parse_known_args(words)
        check_fairseq(parser, args.data, fairseq, words)
        return cls.from_flags(parser, {**vars(args), "fairseq": fairseq})

    def resolve(self) -> None:
        super().resolve()
        for name, value in ARCHITECTURES[self.arch].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.embed_dim % self.heads:
            raise ValueError(f"--embed-dim {self.embed_dim} is not divisible by --heads {self.heads}")
        if self.spectral and self.init not in (None, "spectral"):
            raise ValueError(f"--spectral and --init {self.init} exclude each other: give one")
        self.init, self.spectral = "spectral" if self.spectral else self.init or "regular", False
        factorized = 0 < self.rank_scale < 1
        for name, given in (("--wd2fd", self.wd2fd), (f"--init {self.init}", self.init != "regular")):
            if given and not factorized:
                raise ValueError(
                    f"{name} needs factorized layers: give --rank-scale above 0 and below 1, got {self.rank_scale:g}"
                )
        self._resolve_decay()
        self._resolve_training()

    def _resolve_decay(self) -> None:
        decayed = self.wd2fd or self.wd2fd_quekey or self.wd2fd_outval
        if self.frobenius_decay and not decayed:
            raise ValueError("--frobenius-decay needs --wd2fd, --wd2fd-quekey or --wd2fd-outval: they say what it decays")
        if decayed and self.frobenius_decay is None:
            self.frobenius_decay = self.weight_decay or DEFAULT_DECAY
            reason = "the value of --weight-decay" if self.weight_decay else "the default without --weight-decay"
            self.warnings.append(f"--frobenius-decay is not given: using {self.frobenius_decay:g}, {reason}")
        self.frobenius_decay = self.frobenius_decay if decayed else 0.0

    def _resolve_training(self) -> None:
        if self.lr is None and self.optimizer != "nag":
            raise ValueError(f"--optimizer {self.optimizer} needs --lr: the default, {_NAG['lr']}, is for nag")
        if self.lr is None:
            self.lr = _NAG["lr"]
        if self.lr_scheduler == "inverse_sqrt":
            self.warmup_updates = 4000 if self.warmup_updates is None else self.warmup_updates
            if self.warmup_init_lr is None:
                self.warmup_init_lr = _NAG["warmup_init_lr"] if self.optimizer == "nag" else 0.0
        given = {group[0] for group in _groups(self.fairseq)}
        as_long_as_training = (self.lr_scheduler == "cosine" and "--lr-period-updates" not in given) or (
            self.lr_scheduler == "tri_stage" and "--phase-ratio" in given
        )
        if self.max_steps is not None and as_long_as_training:
            raise ValueError(
                f"--max-steps {self.max_steps} would shorten the schedule of --lr-scheduler {self.lr_scheduler}, which is as "
                "long as the training: leave it out, and stop the run with a signal"
            )
        if self.max_steps is not None and "--patience" in given:
            raise ValueError(
                f"--max-steps {self.max_steps} would count one more validation for --patience: leave it out, and stop the run "
                "with a signal"
            )
        if self.warmup_updates == 0 and self.lr_scheduler == "inverse_sqrt":
            raise ValueError("--warmup-updates must be at least 1 for inverse_sqrt, got 0")
        for name, path in (("DATA", self.data), ("--save-dir", self.save_dir)):
            refuse_separator(name, path)
        if self.criterion == "cross_entropy":
            if self.smoothed_over == "all":
                raise ValueError("--smoothed-over needs label_smoothed_cross_entropy, got --criterion cross_entropy")
            if self.label_smoothing:
                raise ValueError("--label-smoothing needs label_smoothed_cross_entropy, got --criterion cross_entropy")
            self.label_smoothing, self.smoothed_over = 0.0, "others"
        self.label_smoothing = 0.1 if self.label_smoothing is None else self.label_smoothing
        self.smoothed_over = self.smoothed_over or "all"
        if self.seed >= 2**32 - self.max_update:
            raise ValueError(f"--seed must be below 2^32 minus --max-update, got {self.seed}")

    def record(self) -> dict[str, Any]:
        """The record of any configuration, with the flags of fairseq that change the result in alphabetical order."""
        plain = {("--ddp-backend", name) for name in _PLAIN_DDP}
        kept = [group for group in _groups(self.fairseq) if group[0] not in _HARMLESS and group not in plain]
        return {**super().record(), "fairseq": [" ".join(group) for group in sorted(kept)]}

    def fairseq_words(self, save_dir: Path) -> list[str]:
        """The configuration as a command line for fairseq."""
        values = {name: getattr(self, name) for name in _PASSED}
        values["max_update"] = min(self.max_update, self.max_steps or self.max_update)
        values["criterion"] = CRITERIONS[self.criterion]
        if self.criterion == "label_smoothed_cross_entropy":
            values["label_smoothing"] = self.label_smoothing
        warmup = {"warmup_init_lr": self.warmup_init_lr, "warmup_updates": self.warmup_updates}
        values |= {name: value for name, value in warmup.items() if value is not None}
        words = [str(self.data), "--user-dir", str(PLUGIN), "--task", TASK, "--save-dir", str(save_dir)]
        for name, value in values.items():
            words += ["--" + name.replace("_", "-"), str(value)]
        words += ["--" + name.replace("_", "-") for name in _SWITCHES if getattr(self, name)]
        words += ["--rebuild-batches"] if self.batches == "each-epoch" else []
        half = {"--fp16", "--bf16"} & {*self.fairseq}
        if half and self.weight_decay and (self.wd2fd or self.wd2fd_quekey or self.wd2fd_outval):
            words.append("--fp16-no-flatten-grads")  # flat gradients cannot exempt parameters from weight decay
        return [*words, *WHOLE, *self.fairseq]


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def refuse_separator(name: str, path: Path | None) -> None:
    """Raise ValueError for a path with a colon, at which fairseq splits paths."""
    if path is not None and ":" in str(path):
        raise ValueError(f"{name} {path} has a colon, at which fairseq splits paths: choose another name")


def _groups(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Flags with their values, each written as ``--flag value``, ``--flag=value`` or ``-f value``."""
    groups: list[list[str]] = []
    for word in words:
        if re.match("--?[A-Za-z]", word):
            groups.append(word.split("=", 1))
        elif groups:
            groups[-1].append(word)
    return [tuple(group) for group in groups]


def check_fairseq(parser: FlagParser, data: Path, fairseq: Sequence[str], words: Sequence[str]) -> None:
    """Refuse flags of fairseq that this program sets, and DATA after a flag, whose value could be mistaken for DATA."""
    paths = [Path(os.path.expanduser(word)) for word in words]
    given = next(index for index, word in enumerate(words) if not word.startswith("-") and paths[index] == data)
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    if fairseq and given > first:
        parser.error(f"DATA must come before the flags, got {words[given]} after {words[first]}")
    if fairseq and not fairseq[0].startswith("-"):
        parser.error(f"unrecognized arguments: {fairseq[0]}")
    for name, *_ in _groups(fairseq):
        if name in _OWN:
            parser.error(f"{name} cannot be passed on to fairseq: this program relies on its own value of it")


def parse_prepare(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags of prepare.py."""
    parser = FlagParser(prog=f"{ModelConfig.program}/prepare.py", description="Prepare sentence pairs for train.py.")
    parser.add_argument(
        "--corpus",
        choices=("iwslt14", "numbers"),
        help="IWSLT'14 German-English (the default), or German and English number words, which need no download",
    )
    for split in ("train", "valid", "test"):
        parser.add_argument(f"--{split}-prefix", type=Path, help=f"your own {split} pairs: PREFIX.de and PREFIX.en, or .gz")
    parser.add_argument("-s", "--source-lang", default="de")
    parser.add_argument("-t", "--target-lang", default="en")
    parser.add_argument("--bpe", type=positive_int, metavar="N", help="subword merges (default: 25000; numbers: 300)")
    parser.add_argument(
        "--padding-factor",
        type=positive_int,
        metavar="N",
        help="fill dictionaries up to a multiple of N words; current fairseq uses 8 (default: 1, as in the released code; an "
        "existing folder may have any)",
    )
    parser.add_argument("--keep-case", action="store_true", help="do not convert the text to lower case")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="folder of de-en.tgz, which is downloaded if it is missing (default: data/iwslt14)",
    )
    parser.add_argument("--sha256", help="SHA-256 that de-en.tgz must have; the actual one is printed and recorded")
    parser.add_argument("--seed", type=natural, help="seed of the numbers that are drawn (default: 0)")
    parser.add_argument("--size", type=positive_int, metavar="N", help="training pairs of numbers (default: 20000)")
    parser.add_argument(
        "--dest", type=Path, help="folder to write (default: data-bin/iwslt14.tokenized.de-en, or data-bin/<corpus>)"
    )
    args = parser.parse_args(argv)
    prefixes = [args.train_prefix, args.valid_prefix, args.test_prefix]
    if any(prefixes) and not all(prefixes):
        parser.error("--train-prefix, --valid-prefix and --test-prefix go together: give all three")
    if any(prefixes) and args.corpus:
        parser.error(f"--corpus {args.corpus} and --train-prefix exclude each other: give one")
    if args.source_lang == args.target_lang:
        parser.error(f"--source-lang and --target-lang must differ, got {args.source_lang} for both")
    for name in ("source_lang", "target_lang"):
        if not re.fullmatch(r"\w+", getattr(args, name)):
            flag_name = f"--{name.replace('_', '-')}"
            parser.error(
                f"{flag_name} must be letters, digits and _, got {getattr(args, name)}: fairseq reads it from file names"
            )
    if any(prefixes) and args.dest is None:
        parser.error("--train-prefix needs --dest: the folder to write")
    args.corpus = args.corpus or (None if any(prefixes) else "iwslt14")
    if args.corpus and (args.source_lang, args.target_lang) != ("de", "en"):
        parser.error(f"--corpus {args.corpus} is from de to en, got {args.source_lang} to {args.target_lang}")
    own: dict[str, dict[str, Any]] = {
        "iwslt14": {"data_dir": ROOT / "data" / "iwslt14", "sha256": None},
        "numbers": {"seed": 0, "size": 20_000},
    }
    for corpus, defaults in own.items():
        for name, default in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif corpus != args.corpus:
                given = f"--corpus {args.corpus}" if args.corpus else "--train-prefix"
                parser.error(f"--{name.replace('_', '-')} needs --corpus {corpus}, got {given}")
    if args.corpus == "numbers" and args.size > 50_000:
        parser.error(f"--size of numbers must be at most 50000, got {args.size}")
    args.bpe = args.bpe or (300 if args.corpus == "numbers" else 25_000)
    names = {"iwslt14": "iwslt14.tokenized.de-en", "numbers": "numbers"}
    args.dest = (args.dest or ROOT / "data-bin" / names[args.corpus]).resolve()  # replaces the folder, not a link to it
    return args


BEAM, LENPEN = 5, 1.0


def parse_generate(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags of generate.py; ``fairseq`` holds those of fairseq."""
    parser = FlagParser(
        prog=f"{ModelConfig.program}/generate.py",
        description="Translate a split with a checkpoint and score it. Flags of fairseq-generate that are not listed here are "
        "passed on to it.",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder that prepare.py wrote; give it before all flags")
    parser.add_argument("--path", type=Path, required=True, help="checkpoint; the model is rebuilt from it alone")
    parser.add_argument("--gen-subset", default="test", choices=("train", "valid", "test"), help="split to translate")
    parser.add_argument(
        "--batch-size", "--max-sentences", type=positive_int, default=128, metavar="N", help="sentences per batch"
    )
    parser.add_argument("--beam", type=positive_int, default=BEAM)
    parser.add_argument("--lenpen", type=float, default=LENPEN, help="scores are divided by the length to this power")
    parser.add_argument("--remove-bpe", nargs="?", const="subword_nmt", help="accepted and ignored: subwords are always joined")
    parser.add_argument("--quiet", action="store_true", help="do not print the translations")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="also write the scores here")
    parser.add_argument("--rank-scale", type=rank_scale, help="rank scale that the checkpoint must have; not needed")
    parser.add_argument("--results-path", type=Path, help="folder for scores and translations (default: beside the checkpoint)")
    parser.add_argument("--cpu", action="store_true", help="translate on the CPU even if there is a GPU")
    words = [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    args, args.fairseq = parser.parse_known_args(words)
    check_fairseq(parser, args.data, args.fairseq, words)
    if "--skip-invalid-size-inputs-valid-test" in args.fairseq:
        parser.error("--skip-invalid-size-inputs-valid-test would leave sentences out, but BLEU must cover the whole split")
    if not math.isfinite(args.lenpen):
        parser.error(f"--lenpen must be finite, got {args.lenpen}")
    if args.dump is not None and args.dump.is_dir():
        parser.error(f"--dump {args.dump} is a folder: give a file")
    if args.results_path is not None and args.results_path.exists() and not args.results_path.is_dir():
        parser.error(f"--results-path {args.results_path} is a file: give a folder")
    return args


def parse_translate(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags of translate.py."""
    parser = FlagParser(
        prog=f"{ModelConfig.program}/translate.py", description="Translate lines from standard input to standard output."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a run of train.py")
    parser.add_argument("--vocabulary", type=Path, help="folder of dictionaries and codes (default: the run's)")
    parser.add_argument("--beam", type=positive_int, default=BEAM)
    parser.add_argument("--lenpen", type=float, default=LENPEN, help="scores are divided by the length to this power")
    parser.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="sentences per batch")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, or the number of a GPU")
    args = parser.parse_args(argv)
    if not math.isfinite(args.lenpen):
        parser.error(f"--lenpen must be finite, got {args.lenpen}")
    return args
