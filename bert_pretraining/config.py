"""Configuration of pre-training. Loads without torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common.experiments.config import REQUIRED, Config, flag, non_negative, override, positive_int, share
from common.experiments.files import in_project, read_json
from common.experiments.run_config import RunConfig, TrainingConfig

SIZES = {  # layers, dimensions, heads, as in google-research/bert
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
POSITIONS = ("learned", "alibi", "directed-alibi")
INITS = ("regular", "spectral", "norm-matched")
MASKED = 0.15  # share of the positions that are predicted, unless --predictions gives their number


def _rank_scale(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], where 0 and 1 keep the full width, got {text}")
    return value


def _size(text: str) -> Any:
    return flag(None, type=positive_int, metavar="N", help=f"{text} (default: that of --model)")


@dataclass(kw_only=True)
class EncoderFlags(Config):
    """The encoder, and how it is factorized."""

    group: ClassVar[str | None] = "model"

    model: str = flag(
        "base", choices=list(SIZES), changes_result=False, help="size of the encoder; the next four flags override it"
    )
    layers: int = _size("encoder layers")
    embed_dim: int = _size("dimensions of embeddings and hidden states")
    heads: int = _size("attention heads")
    ffn_dim: int = flag(
        None, type=positive_int, metavar="N", help="hidden dimensions of feed-forward layers (default: 4 x --embed-dim)"
    )
    positions: str = flag(
        "learned",
        metavar=f"{{{','.join(POSITIONS)}}}",
        help="learned position embeddings, or alibi: a bias on attention scores that grows with distance. It is the same on "
        "both sides; with directed-alibi, half of the heads look back and half look ahead",
    )
    max_positions: int = flag(512, type=positive_int, metavar="N", help="maximum number of tokens in a sequence")
    dropout: float = flag(0.0, type=share, help="dropout of hidden states and attention weights")
    init_std: float = flag(
        None, type=non_negative, help="standard deviation of initial weights (default: 0.02 sqrt(768 / --embed-dim))"
    )
    rank_scale: float = flag(0.0, type=_rank_scale, help="width of heads as a share of the full width; 0 is the full width")
    rank_scale_layers: float = flag(0.0, type=_rank_scale, help="rank scale of feed-forward layers; 0 is dense")
    rank_scale_embeddings: float = flag(0.0, type=_rank_scale, help="rank scale of the word and position tables; 0 is dense")
    init: str = flag(None, choices=INITS, help="initialization of factorized layers (default: regular)")
    quekey_init: str = flag(None, choices=INITS, help="initialization of query-key products (default: regular)")
    outval_init: str = flag(None, choices=INITS, help="initialization of output-value products (default: regular)")
    spectral: bool = flag(False, changes_result=False, help="short for --init spectral")
    spectral_quekey: bool = flag(False, changes_result=False, help="short for --quekey-init spectral")
    spectral_outval: bool = flag(False, changes_result=False, help="short for --outval-init spectral")
    spectral_from: str = flag(
        "full",
        choices=("full", "narrow"),
        help="spectral initialization of narrow heads: full truncates the products of full-width heads; narrow balances the "
        "factors of the narrow heads, as the released translation code does",
    )
    wd2fd: bool = flag(False, help="Frobenius decay in place of weight decay on factorized layers")
    wd2fd_quekey: bool = flag(False, help="Frobenius decay in place of weight decay on each head's query-key product")
    wd2fd_outval: bool = flag(False, help="Frobenius decay in place of weight decay on each head's output-value product")
    frobenius_decay: float = flag(
        None, type=non_negative, metavar="D", help="strength of the Frobenius decay (default: that of --weight-decay)"
    )

    def resolve(self) -> None:
        super().resolve()
        layers, embed_dim, heads = SIZES[self.model]
        self.layers, self.embed_dim, self.heads = self.layers or layers, self.embed_dim or embed_dim, self.heads or heads
        self.ffn_dim = self.ffn_dim or 4 * self.embed_dim
        if self.embed_dim % self.heads:
            raise ValueError(f"--embed-dim {self.embed_dim} is not divisible by --heads {self.heads}")
        if self.positions not in POSITIONS:
            rotary = ": rotation gives a different query-key product at every distance, so there is no single one to factorize"
            raise ValueError(
                f"--positions must be {' or '.join(POSITIONS)}, got {self.positions}{rotary * (self.positions == 'rotary')}"
            )
        full = self.embed_dim // self.heads
        if self.narrow and int(self.rank_scale * full) < 1:
            raise ValueError(f"--rank-scale {self.rank_scale:g} leaves none of the {full} dimensions of a head: raise it")
        self._resolve_inits()
        if self.init_std is None:
            self.init_std = 0.02 * (768 / self.embed_dim) ** 0.5

    @property
    def narrow(self) -> bool:
        """Whether heads are narrower than full width."""
        return 0 < self.rank_scale < 1

    def _resolve_inits(self) -> None:
        for name, short in (("init", "spectral"), ("quekey_init", "spectral_quekey"), ("outval_init", "spectral_outval")):
            given = getattr(self, name)
            if getattr(self, short) and given not in (None, "spectral"):
                short, name = (each.replace("_", "-") for each in (short, name))
                raise ValueError(f"--{short} and --{name} {given} exclude each other: give one")
            setattr(self, name, "spectral" if getattr(self, short) else given or "regular")
            setattr(self, short, False)
        factorized = any(0 < scale < 1 for scale in (self.rank_scale_layers, self.rank_scale_embeddings))
        for flag_name, given in (("--wd2fd", self.wd2fd), (f"--init {self.init}", self.init != "regular")):
            if given and not factorized:
                raise ValueError(
                    f"{flag_name} needs factorized layers: give --rank-scale-layers or --rank-scale-embeddings below 1"
                )
        for name in ("quekey_init", "outval_init"):
            if getattr(self, name) == "norm-matched" and not self.narrow:
                flag_name = "--" + name.replace("_", "-")
                raise ValueError(f"{flag_name} norm-matched needs narrow heads: give --rank-scale above 0 and below 1")
        if self.spectral_from == "narrow" and "spectral" not in (self.quekey_init, self.outval_init):
            raise ValueError("--spectral-from narrow needs --spectral-quekey or --spectral-outval: it says what they decompose")

    def architecture(self, words: int) -> dict[str, Any]:
        """The fields of :class:`bert_pretraining.model.EncoderConfig` for a vocabulary of ``words`` words."""
        names = (
            *("layers", "embed_dim", "heads", "ffn_dim", "positions", "max_positions", "dropout", "init_std"),
            *("rank_scale", "rank_scale_layers", "rank_scale_embeddings"),
            *("init", "quekey_init", "outval_init", "spectral_from"),
        )
        return {"words": words, **{name: getattr(self, name) for name in names}}


@dataclass(kw_only=True)
class PretrainingConfig(RunConfig, EncoderFlags):
    """A run of bert_pretraining/train.py."""

    program: ClassVar[str] = "bert_pretraining"
    description: ClassVar[str] = (
        "Pre-train an encoder on text with masked-language modeling: full or factorized, with LAMB, FLAMBe or AdamW."
    )
    group: ClassVar[str | None] = "training"

    dry_run: bool = override(
        RunConfig, "dry_run", group="run", help="build the model for the vocabulary of DATA, print it as JSON and stop"
    )
    data: Path = flag(
        REQUIRED, "data", group="", type=Path, metavar="DATA", changes_result=False, help="folder that prepare.py wrote"
    )
    seq: int = flag(128, type=positive_int, metavar="N", help="tokens per sequence")
    predictions: int = flag(
        None, type=positive_int, metavar="N", help=f"masked positions per sequence (default: {MASKED:.0%}% of --seq)"
    )
    optimizer: str = flag(
        "lamb",
        choices=("lamb", "adamw"),
        help="lamb adds Frobenius decay to its update before the trust ratio (FLAMBe); adamw subtracts it from the weights",
    )
    steps: int = flag(10_000, type=positive_int, metavar="N", help="optimizer steps in the schedule")
    epoch_steps: int = flag(
        500, type=positive_int, metavar="N", help="steps per epoch; an epoch ends with an evaluation and a checkpoint"
    )
    batch_size: int = override(
        TrainingConfig, "batch_size", 256, help="sequences per step, over all processes and accumulated parts"
    )
    seed: int = override(TrainingConfig, "seed", help="seed of initialization, batches, masks and dropout")
    update_freq: int = flag(
        1,
        type=positive_int,
        metavar="N",
        changes_result=False,
        help="parts into which a step's batch is split to accumulate gradients",
    )
    lr: float = override(TrainingConfig, "lr", 1e-3, help="highest learning rate")
    warmup: float = flag(0.06, type=share, help="share of the steps during which the learning rate rises from 0")
    lr_power: float = flag(
        1.0, type=non_negative, help="after warm-up the learning rate is --lr times the share of remaining steps to this power"
    )
    beta1: float = flag(0.9, type=share, help="beta1 of both optimizers")
    beta2: float = flag(0.999, type=share, help="beta2 of both optimizers")
    eps: float = flag(1e-6, type=non_negative, help="epsilon of both optimizers")
    clip_norm: float = flag(0.0, type=non_negative, help="bound on the norm of all gradients together; 0 does not clip")
    weight_decay: float = override(TrainingConfig, "weight_decay", 0.01, help="weight decay of all weights except norms")
    init_from: Path | None = flag(
        None,
        type=Path,
        metavar="RUN",
        input_file=True,
        help="run or checkpoint whose weights training starts from, such as a first phase",
    )
    pretraining: str | None = flag(
        None, metavar="HASH", help="configuration hash that the run of --init-from must have, so that rows differ by it"
    )

    def resolve(self) -> None:
        if self.init_from is not None and self.init_from.is_dir():
            self.init_from = self.init_from / "checkpoint.pt"
        self.data = in_project(self.data)
        super().resolve()
        self.predictions = self.predictions or max(1, round(MASKED * self.seq))
        if self.seq < 2 or self.predictions > self.seq - 1:
            raise ValueError(f"--predictions must be below --seq, got {self.predictions} of {self.seq} positions")
        if self.seq > self.max_positions:
            raise ValueError(f"--seq {self.seq} is longer than --max-positions {self.max_positions}: raise that")
        if self.batch_size % self.update_freq:
            raise ValueError(f"--batch-size {self.batch_size} is not divisible by --update-freq {self.update_freq}")
        if self.pretraining is not None and self.init_from is None:
            raise ValueError("--pretraining needs --init-from: it checks the configuration of that run")
        decayed = self.wd2fd or self.wd2fd_quekey or self.wd2fd_outval
        if self.frobenius_decay and not decayed:
            raise ValueError("--frobenius-decay needs --wd2fd, --wd2fd-quekey or --wd2fd-outval: they say what it decays")
        if self.frobenius_decay is None or not decayed:
            self.frobenius_decay = self.weight_decay if decayed else 0.0

    def inputs(self) -> dict[str, str]:
        """Digests of the corpus, as prepare.py recorded them, and of the checkpoint of --init-from."""
        facts = self.data / "corpus.json"
        digests = read_json(facts)["digests"] if facts.exists() else {}
        return super().inputs() | {Path(name).stem: digest for name, digest in digests.items()}

    def run_name(self) -> str:
        return f"{self.layers}x{self.embed_dim}"
