"""Configurations of the compression programs train.py, prune.py and sparse.py; loads without torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.experiments.config import REQUIRED, flag, natural, non_negative, override, positive_int
from common.experiments.run_config import TrainingConfig
from common.vision.config import DataConfig, ImageRunConfig, LowRankTrainingConfig

VGG_DEPTHS = (11, 13, 16, 19)
PRUNERS = ("c-obd", "c-obs", "kron-obd", "kron-obs", "eigendamage", "eigendamage-separable")
# Defaults of the sparse methods. update_every None: every epoch. A method refuses flags that are not listed for it.
SPARSE_DEFAULTS: dict[str, dict[str, object]] = {
    "magnitude": {"distribution": "uniform", "update_every": 100, "update_until": 0.75},
    "lottery": {"distribution": "global", "rounds": 5, "rewind": None},
    "snip": {"score_batches": None},
    "grasp": {"score_batches": None},
    "synflow": {},
    "set": {"distribution": "erk", "update_every": None, "update_until": 1.0, "drop_fraction": 0.3},
    "deepr": {"distribution": "uniform", "l1": 1e-5, "temperature": 1e-10},
    "dsr": {"distribution": "uniform", "update_every": None, "update_until": 0.75, "drop_fraction": 0.1},
    "rigl": {"distribution": "erk", "update_every": 100, "update_until": 0.75, "drop_fraction": 0.3},
}
SPARSE = tuple(SPARSE_DEFAULTS)
_SPARSE_FLAGS = sorted({name for defaults in SPARSE_DEFAULTS.values() for name in defaults})


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


@dataclass(kw_only=True)
class CompressionConfig(ImageRunConfig):
    """Flags that the three programs share: the network and its recipe."""

    program: ClassVar[str] = "compression_baselines"

    network: str = flag("vgg", choices=("resnet", "vgg"), help="network")
    depth: int = flag(None, type=int, help="6n + 2 for resnet (default: 32); 11, 13, 16 or 19 for vgg (default: 19)")
    width: int | None = flag(None, type=int, choices=(64, 32), help="channels of ResNet's first stage (default: 64)")
    data: str = override(DataConfig, "data", choices=("cifar10", "cifar100", "tiny_imagenet", "digits", "imagefolder"))
    weight_decay: float = override(TrainingConfig, "weight_decay", None)
    auto_resume: bool = flag(False, changes_result=False, help="short for --resume auto")
    kaiming: bool = flag(False, help="VGG: Kaiming initialization of the classifier and of each factor")
    measure: bool = flag(
        False,
        changes_result=False,
        help="also measure size, multiply-adds, latency and memory (measure.json)",
    )

    def resolve(self) -> None:
        if self.data == "digits" and self.image_size is None:
            self.image_size = 32  # VGG halves its images five times
        if self.auto_resume:
            if self.resume not in (None, "auto"):
                raise ValueError(f"--auto-resume and --resume {self.resume} exclude each other: give one")
            self.resume, self.auto_resume = "auto", False
        super().resolve()
        if self.network == "vgg":
            self.depth = 19 if self.depth is None else self.depth
            if self.depth not in VGG_DEPTHS:
                raise ValueError(f"--depth of vgg must be 11, 13, 16 or 19, got {self.depth}")
            if self.width is not None:
                raise ValueError(f"--width is for resnet, got {self.width} with vgg")
        else:
            self.depth, self.width = 32 if self.depth is None else self.depth, self.width or 64
            if self.depth < 8 or self.depth % 6 != 2:
                raise ValueError(f"--depth of resnet must be 6n + 2 and at least 8, got {self.depth}")
            if self.kaiming:
                raise ValueError("--kaiming is for vgg: resnet always has this initialization")
        if self.weight_decay is None:
            self.weight_decay = 1e-4 if self.network == "resnet" else 2e-4

    def run_name(self) -> str:
        return f"{self.network}{self.depth}-{self.data}"


@dataclass(kw_only=True)
class FreshNetworkConfig(CompressionConfig):
    """How a network that is not loaded is initialized."""

    classifier_bias: str = flag(
        None,
        choices=("zero", "default"),
        before="default",
        help="initial bias of resnet's classifier, and of vgg's with --kaiming: zero, as in the released code, or torch's "
        "default initialization (default: zero); without --kaiming, vgg's is always zero",
    )

    def resolve(self) -> None:
        super().resolve()
        drawn = self.network == "resnet" or self.kaiming
        if not drawn and self.classifier_bias == "zero":
            raise ValueError(
                "--classifier-bias is for resnet, and for vgg with --kaiming: without it, vgg's bias is always zero"
            )
        self.classifier_bias = self.classifier_bias or ("zero" if drawn else "default")


@dataclass(kw_only=True)
class LowRankBudgetConfig(FreshNetworkConfig, LowRankTrainingConfig):
    """A run of compression_baselines/train.py."""

    description: ClassVar[str] = "Train ResNet32 or VGG19 at a budget of parameters."
    layers: ClassVar[str] = "every convolution but the first"


@dataclass(kw_only=True)
class PruningConfig(CompressionConfig):
    """A run of compression_baselines/prune.py."""

    script: ClassVar[str] = "prune.py"
    description: ClassVar[str] = "Prune the channels of a trained network, then fine-tune it."
    group: ClassVar[str | None] = "pruning"

    epochs: int = override(ImageRunConfig, "epochs", 150)
    lr: float = override(TrainingConfig, "lr", 1e-3)  # as EigenDamage fine-tunes
    method: str = flag(REQUIRED, choices=PRUNERS, help="what is pruned, and by which score")
    pretrained: Path | None = flag(
        None, type=Path, metavar="FILE", input_file=True, help="checkpoint of the trained dense network"
    )
    target_ratio: float | None = flag(None, type=_share, help="parameters to keep, as a share of the dense network's")
    ratio: float | None = flag(None, type=_share, help="instead of --target-ratio: channels (or eigendirections) to remove")
    prune_ratio_limit: float = flag(
        0.95, type=_share, help="largest share of a layer's channels (or eigendirections) to remove in one round"
    )
    rounds: int = flag(1, type=positive_int, help="iterative pruning: number of rounds, each of --epochs")
    fisher: str = flag(
        "true", choices=("true", "empirical"), help="Fisher of labels sampled from the network, or of the given ones"
    )
    fisher_samples: int | None = flag(
        None, type=positive_int, metavar="N", help="images for the Fisher (default: the training split)"
    )
    fix_rotation: bool = flag(False, help="eigendamage: do not train the rotations")

    def resolve(self) -> None:
        super().resolve()
        if (self.ratio is None) == (self.target_ratio is None) and not self.evaluate:
            raise ValueError("give exactly one of --target-ratio (parameters to keep) and --ratio (channels to remove)")
        if self.pretrained is None and not self.evaluate:
            raise ValueError("--pretrained is missing: give the checkpoint.pt of a dense run of train.py")
        for name in ("ratio", "prune_ratio_limit"):
            if getattr(self, name) == 1:
                raise ValueError(f"--{name.replace('_', '-')} must be below 1: at 1 nothing would be left")
        if self.rounds > 1 and self.method == "eigendamage-separable":
            raise ValueError(
                "--rounds above 1 is not for eigendamage-separable: its depthwise middle has no eigenbasis for another round"
            )
        if self.fix_rotation and not self.method.startswith("eigendamage"):
            raise ValueError(f"--fix-rotation is for eigendamage: {self.method} has no rotations")

    def run_name(self) -> str:
        return f"{self.method}-{super().run_name()}"


@dataclass(kw_only=True)
class SparseConfig(FreshNetworkConfig):
    """A run of compression_baselines/sparse.py."""

    script: ClassVar[str] = "sparse.py"
    description: ClassVar[str] = "Train a network with a given number of non-zero weights."
    group: ClassVar[str | None] = "sparsity (defaults depend on the method)"

    method: str = flag(REQUIRED, choices=SPARSE, help="how the non-zeros are chosen")
    target_ratio: float | None = flag(None, type=_share, help="non-zeros to keep, as a share of all parameters")
    distribution: str | None = flag(
        None, choices=("uniform", "erk", "global"), help="how non-zeros are distributed over layers"
    )
    update_every: int | None = flag(None, type=positive_int, metavar="N", help="steps between changes of the masks")
    update_until: float | None = flag(None, type=_share, help="share of the training after which masks no longer change")
    drop_fraction: float | None = flag(None, type=_share, help="share of the non-zeros that a change replaces")
    rounds: int | None = flag(None, type=positive_int, help="lottery: number of trainings, each of --epochs")
    rewind: int | None = flag(None, type=natural, metavar="EPOCH", help="lottery: epoch to whose weights each round rewinds")
    score_batches: int | None = flag(
        None, type=positive_int, metavar="N", help="snip, grasp: batches for the scores (default: 10 images per class)"
    )
    l1: float | None = flag(None, type=non_negative, help="deepr: strength of the decay towards zero")
    temperature: float | None = flag(None, type=non_negative, help="deepr: strength of the random walk")

    def resolve(self) -> None:
        super().resolve()
        if self.target_ratio is None and not self.evaluate:
            raise ValueError("--target-ratio is missing: give the share of all parameters to keep")
        defaults = SPARSE_DEFAULTS[self.method]
        for name in _SPARSE_FLAGS:
            if name not in defaults and getattr(self, name) is not None:
                users = ", ".join(method for method in SPARSE if name in SPARSE_DEFAULTS[method])
                raise ValueError(f"--{name.replace('_', '-')} is for {users}: {self.method} does not use it")
            if getattr(self, name) is None:
                setattr(self, name, defaults.get(name))
        if self.distribution == "global" and self.method not in ("magnitude", "lottery"):
            raise ValueError(f"--distribution global is for magnitude and lottery: {self.method} takes uniform or erk")
        if self.method == "lottery":
            assert self.rounds is not None
            if self.rewind is None:
                self.rewind = min(1, self.epochs - 1)
            if self.rewind >= self.epochs:
                raise ValueError(
                    f"--rewind must be an epoch of the first round, below --epochs {self.epochs}, got {self.rewind}"
                )
            if self.rounds < 2:
                raise ValueError("--rounds must be at least 2 for lottery: it prunes between rounds, got 1")
        if self.compile:
            raise ValueError("--compile is not for sparse.py: compiled code would not see the masks change")

    def run_name(self) -> str:
        return f"{self.method}-{super().run_name()}"
