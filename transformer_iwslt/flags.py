"""Command lines of the translation programs; loads without torch and without fairseq."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.runs import ROOT, FlagParser, natural, non_negative, positive_int

PROGRAM = "transformer_iwslt"
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
DEFAULT_DECAY = 1e-4  # strength of Frobenius decay where no flag tells one

# The recipe of the released scripts, for its optimizer; another optimizer needs a rate of its own.
_NAG = {"lr": 0.25, "warmup_init_lr": 0.25}
# What this program reads itself and passes on to fairseq.
_PASSED = ("arch", "optimizer", "lr", "lr_scheduler", "clip_norm", "max_tokens", "max_update", "weight_decay", "seed")
# Flags of fairseq that change no result, and those that this program sets itself or whose effects it relies on.
_HARMLESS = {
    "--num-workers", "--log-interval", "--tensorboard-logdir", "--wandb-project", "--keep-last-epochs",
    "--no-epoch-checkpoints", "--no-progress-bar", "--device-id", "--distributed-port", "--distributed-init-method",
    "--distributed-rank", "--distributed-no-spawn", "--distributed-backend",
}  # fmt: skip
_PLAIN_DDP = ("pytorch_ddp", "c10d", "legacy_ddp", "no_c10d")  # values of --ddp-backend that compute the same
_OWN = {
    "--task", "--user-dir", "--restore-file", "--checkpoint-suffix", "--valid-subset", "--no-save", "--no-last-checkpoints",
    "--log-format", "--log-file", "--left-pad-target",
}  # fmt: skip

# By default fairseq leaves out the last batch where its size is no multiple of 8: of 500 test sentences it translates 496.
WHOLE = ("--required-batch-size-multiple", "1")


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


def rank_scale(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], where 0 and 1 factorize nothing, got {text}")
    return value


def add_model_flags(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Add the flags of the model, for this program's parser and for fairseq's."""
    for flags, text in (
        (("--embed-dim", "--hidden-size"), "dimensions of embeddings and of hidden states"),
        (("--ffn-dim", "--filter-size"), "dimensions inside a feed-forward layer"),
        (("--layers", "--num-layers"), "layers of the encoder, and as many of the decoder"),
        (("--heads", "--num-head"), "heads of an attention"),
    ):
        parser.add_argument(*flags, type=positive_int, help=f"{text} (default: the architecture's)")
    for flag in ("--dropout", "--attention-dropout", "--activation-dropout"):
        parser.add_argument(flag, type=share, help="(default: the architecture's)")
    parser.add_argument("--rank-scale", type=rank_scale, default=0.0, help="rank as a share of the full one; 0 is dense")
    parser.add_argument(
        "--init", choices=("regular", "spectral", "norm-matched"), help="of factorized layers (default: regular)"
    )
    parser.add_argument("--spectral", action="store_true", help="spectral initialization, short for --init spectral")
    parser.add_argument("--spectral-quekey", action="store_true", help="spectral initialization of query-key products")
    parser.add_argument("--spectral-outval", action="store_true", help="spectral initialization of output-value products")
    parser.add_argument("--wd2fd", action="store_true", help="Frobenius decay on the factors of layers, not weight decay")
    parser.add_argument("--wd2fd-quekey", action="store_true", help="the same on query-key products, head by head")
    parser.add_argument("--wd2fd-outval", action="store_true", help="the same on output-value products, head by head")
    parser.add_argument(
        "--frobenius-decay",
        type=non_negative,
        metavar="D",
        help=f"strength of the Frobenius decay (default: --weight-decay where that is positive, else {DEFAULT_DECAY:g})",
    )


def make_parser() -> FlagParser:
    parser = FlagParser(
        prog=f"{PROGRAM}/train.py",
        description="Train a full or factorized Transformer with fairseq, whose other flags are passed on to it. "
        "The defaults are the recipe of the paper's released scripts.",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder that prepare.py wrote, before any flag")
    model = parser.add_argument_group("model")
    model.add_argument("-a", "--arch", choices=ARCHITECTURES, default="transformer_small")
    add_model_flags(model)
    model.set_defaults(dropout=0.2)

    loop = parser.add_argument_group("training")
    loop.add_argument("--optimizer", default="nag")
    loop.add_argument("--lr", "--learning-rate", type=non_negative, help="(default: 0.25 with nag)")
    loop.add_argument("--lr-scheduler", default="inverse_sqrt")
    loop.add_argument("--warmup-init-lr", type=non_negative, help="of inverse_sqrt (default: 0.25 with nag)")
    loop.add_argument("--warmup-updates", type=natural, default=4000, metavar="N", help="of inverse_sqrt")
    loop.add_argument("--clip-norm", type=non_negative, default=0.1)
    loop.add_argument("--weight-decay", "--wd", type=non_negative, default=0.0, help="on what Frobenius decay does not cover")
    loop.add_argument("--criterion", choices=CRITERIONS, default="label_smoothed_cross_entropy")
    loop.add_argument("--label-smoothing", type=share, default=0.1)
    loop.add_argument("--max-tokens", type=positive_int, default=4000, metavar="N", help="target tokens of a batch")
    loop.add_argument("--max-update", type=positive_int, default=100_000, metavar="N")
    loop.add_argument("--max-steps", type=positive_int, metavar="N", help="stop after N updates in all")
    loop.add_argument(
        "--distributed-world-size", type=positive_int, default=1, metavar="N", help="GPUs; batches grow with them"
    )
    loop.add_argument("--seed", type=natural, default=1)
    loop.add_argument("--cpu", action="store_true", help="train on the CPU where there is a GPU too")

    run = parser.add_argument_group("run")
    run.add_argument(
        "--save-dir", type=Path, help="directory of the run (default: results/<program>/<row or run>/<configuration>)"
    )
    run.add_argument("--generate", action="store_true", help="then translate the test set as generate.py does by default")
    run.add_argument("--resume", choices=("auto",), default="auto", help="an unfinished run is gone on with")
    run.add_argument("--dry-run", action="store_true", help="build the model, print it as JSON and stop")
    run.add_argument("--row", help="name of the table row this run is for")
    run.add_argument("--row-config", help="hash of the configuration that row has")
    return parser


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed, completed and checked flags of train.py; what is fairseq's is in ``fairseq``, a list of words.

    Ends in one line on stderr and exit status 2 where they are wrong. ``warnings`` holds what to say to the user.
    """
    parser = make_parser()
    words = [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    args, args.fairseq = parser.parse_known_args(words)
    _check_fairseq(parser, args, words)
    args.warnings = []
    _resolve_model(parser, args)
    _resolve_training(parser, args)
    return args


def _check_fairseq(parser: FlagParser, args: argparse.Namespace, words: Sequence[str]) -> None:
    """Refuse flags of fairseq that this program sets, and DATA after a flag of fairseq's, whose value would be taken for it."""
    given = next(index for index, word in enumerate(words) if not word.startswith("-") and Path(word) == args.data)
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    if args.fairseq and given > first:
        parser.error(f"DATA must come before the flags, got {words[given]} after {words[first]}")
    if args.fairseq and not args.fairseq[0].startswith("-"):
        parser.error(f"unrecognized arguments: {args.fairseq[0]}")
    for flag, *_ in _groups(args.fairseq):
        if flag in _OWN:
            parser.error(f"{flag} is not passed on to fairseq: this program relies on its own value of it")


def _resolve_model(parser: FlagParser, args: argparse.Namespace) -> None:
    for name, value in ARCHITECTURES[args.arch].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.embed_dim % args.heads:
        parser.error(f"--embed-dim {args.embed_dim} does not split over --heads {args.heads}")
    if args.spectral and args.init not in (None, "spectral"):
        parser.error(f"--spectral and --init {args.init} exclude each other: give one")
    args.init = "spectral" if args.spectral else args.init or "regular"
    del args.spectral
    factorized = 0 < args.rank_scale < 1
    for flag, given in (("--wd2fd", args.wd2fd), (f"--init {args.init}", args.init != "regular")):
        if given and not factorized:
            parser.error(f"{flag} needs factorized layers: give --rank-scale above 0 and below 1, got {args.rank_scale:g}")
    decayed = args.wd2fd or args.wd2fd_quekey or args.wd2fd_outval
    if args.frobenius_decay and not decayed:
        parser.error("--frobenius-decay needs --wd2fd, --wd2fd-quekey or --wd2fd-outval: they say what it decays")
    if decayed and args.frobenius_decay is None:
        args.frobenius_decay = args.weight_decay or DEFAULT_DECAY
        reason = "that of --weight-decay" if args.weight_decay else "for lack of --weight-decay"
        args.warnings.append(f"--frobenius-decay is not given: it is {args.frobenius_decay:g}, {reason}")
    args.frobenius_decay = args.frobenius_decay if decayed else 0.0


def _resolve_training(parser: FlagParser, args: argparse.Namespace) -> None:
    if args.lr is None and args.optimizer != "nag":
        parser.error(f"--optimizer {args.optimizer} needs --lr: the default, {_NAG['lr']}, is for nag")
    if args.lr is None:
        args.lr = _NAG["lr"]
    if args.lr_scheduler != "inverse_sqrt":
        args.warmup_init_lr = args.warmup_updates = None
    elif args.warmup_init_lr is None:
        args.warmup_init_lr = _NAG["warmup_init_lr"] if args.optimizer == "nag" else 0.0
    if args.criterion == "cross_entropy":
        args.label_smoothing = 0.0
    if args.seed >= 2**32 - args.max_update:
        parser.error(f"--seed must be below 2^32 less --max-update, got {args.seed}")


def _groups(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Flags with their values, in whichever of the two forms, ``--flag value`` or ``--flag=value``."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append(word.split("=", 1))
        elif groups:
            groups[-1].append(word)
    return [tuple(group) for group in groups]


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The resolved configuration: everything that changes the result, without seed, device and paths."""
    left_out = ("data", "save_dir", "seed", "row", "row_config", "resume", "dry_run", "generate", "cpu", "warnings", "fairseq")
    config = {key: value for key, value in sorted(vars(args).items()) if key not in left_out}
    plain = {("--ddp-backend", name) for name in _PLAIN_DDP}
    kept = [group for group in _groups(args.fairseq) if group[0] not in _HARMLESS and group not in plain]
    return {"program": PROGRAM, **config, "fairseq": [" ".join(group) for group in sorted(kept)]}


def fairseq_words(args: argparse.Namespace, save_dir: Path) -> list[str]:
    """The command line for fairseq that the flags amount to."""
    words = [str(args.data), "--user-dir", str(PLUGIN), "--task", TASK, "--save-dir", str(save_dir)]
    values = {name: getattr(args, name) for name in _PASSED}
    values["max_update"] = min(args.max_update, args.max_steps or args.max_update)
    values |= {name: getattr(args, name) for name in ARCHITECTURES[args.arch]}
    values |= {name: getattr(args, name) for name in ("rank_scale", "init", "frobenius_decay", "distributed_world_size")}
    values["criterion"] = CRITERIONS[args.criterion]
    if args.criterion == "label_smoothed_cross_entropy":
        values["label_smoothing"] = args.label_smoothing
    if args.lr_scheduler == "inverse_sqrt":
        values |= {"warmup_init_lr": args.warmup_init_lr, "warmup_updates": args.warmup_updates}
    for name, value in values.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    for name in ("spectral_quekey", "spectral_outval", "wd2fd", "wd2fd_quekey", "wd2fd_outval", "cpu"):
        words += ["--" + name.replace("_", "-")] if getattr(args, name) else []
    if "--fp16" in args.fairseq and args.weight_decay and (args.wd2fd or args.wd2fd_quekey or args.wd2fd_outval):
        words.append("--fp16-no-flatten-grads")  # flat gradients cannot tell what takes no weight decay
    return [*words, *WHOLE, *args.fairseq]


def parse_prepare(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed and checked flags of prepare.py."""
    parser = FlagParser(prog=f"{PROGRAM}/prepare.py", description="Prepare sentence pairs for train.py.")
    parser.add_argument(
        "--corpus",
        choices=("iwslt14", "numbers"),
        help="IWSLT'14 German-English (the default), or German and English number words, which need no download",
    )
    for split in ("train", "valid", "test"):
        parser.add_argument(f"--{split}-prefix", type=Path, help=f"{split} pairs of one's own: PREFIX.de and PREFIX.en, or .gz")
    parser.add_argument("-s", "--source-lang", default="de")
    parser.add_argument("-t", "--target-lang", default="en")
    parser.add_argument("--bpe", type=positive_int, metavar="N", help="merges (default: 25000; numbers: 300)")
    parser.add_argument("--keep-case", action="store_true", help="do not put everything in lower case")
    parser.add_argument(
        "--data-dir", type=Path, default=ROOT / "data" / "iwslt14", help="where de-en.tgz is, or is downloaded to"
    )
    parser.add_argument("--sha256", help="what de-en.tgz must have; what it has is printed and kept")
    parser.add_argument("--seed", type=natural, default=0, help="of the numbers that are drawn")
    parser.add_argument("--size", type=positive_int, default=20_000, metavar="N", help="training pairs of numbers")
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
        parser.error(f"--source-lang and --target-lang are both {args.source_lang}")
    if any(prefixes) and args.dest is None:
        parser.error("--train-prefix needs --dest: the folder to write")
    args.corpus = args.corpus or (None if any(prefixes) else "iwslt14")
    if args.corpus and (args.source_lang, args.target_lang) != ("de", "en"):
        parser.error(f"--corpus {args.corpus} is from de to en, got {args.source_lang} to {args.target_lang}")
    if args.corpus == "numbers" and args.size > 50_000:
        parser.error(f"--size of numbers must be at most 50000, got {args.size}")
    args.bpe = args.bpe or (300 if args.corpus == "numbers" else 25_000)
    names = {"iwslt14": "iwslt14.tokenized.de-en", "numbers": "numbers"}
    args.dest = args.dest or ROOT / "data-bin" / names[args.corpus]
    return args


BEAM, LENPEN = 5, 1.0


def parse_generate(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed and checked flags of generate.py; what is fairseq's is in ``fairseq``."""
    parser = FlagParser(
        prog=f"{PROGRAM}/generate.py",
        description="Translate a split with a checkpoint and score it. Other flags of fairseq-generate are passed on to it.",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder that prepare.py wrote, before any flag")
    parser.add_argument("--path", type=Path, required=True, help="checkpoint; the model is rebuilt from it alone")
    parser.add_argument("--gen-subset", default="test", choices=("train", "valid", "test"), help="split to translate")
    parser.add_argument(
        "--batch-size", "--max-sentences", type=positive_int, default=128, metavar="N", help="sentences of a batch"
    )
    parser.add_argument("--beam", type=positive_int, default=BEAM)
    parser.add_argument("--lenpen", type=float, default=LENPEN, help="power of the length that scores are divided by")
    parser.add_argument("--remove-bpe", nargs="?", const="subword_nmt", help="accepted; subwords are always joined")
    parser.add_argument("--quiet", action="store_true", help="do not print the translations")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="also write the scores here")
    parser.add_argument("--rank-scale", type=rank_scale, help="checked against the checkpoint, which knows it")
    parser.add_argument("--results-path", type=Path, help="folder for scores and translations (default: by the checkpoint)")
    parser.add_argument("--cpu", action="store_true", help="translate on the CPU where there is a GPU too")
    words = [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    args, args.fairseq = parser.parse_known_args(words)
    _check_fairseq(parser, args, words)
    if not math.isfinite(args.lenpen):
        parser.error(f"--lenpen must be finite, got {args.lenpen}")
    return args


def parse_translate(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed and checked flags of translate.py."""
    parser = FlagParser(prog=f"{PROGRAM}/translate.py", description="Translate lines from standard input to standard output.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a run of train.py")
    parser.add_argument("--vocabulary", type=Path, help="folder of dictionaries and codes (default: the run's)")
    parser.add_argument("--beam", type=positive_int, default=BEAM)
    parser.add_argument("--lenpen", type=float, default=LENPEN, help="power of the length that scores are divided by")
    parser.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="sentences of a batch")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, or the number of a GPU")
    args = parser.parse_args(argv)
    if not math.isfinite(args.lenpen):
        parser.error(f"--lenpen must be finite, got {args.lenpen}")
    return args
