"""Configuration of the ResNet experiments; loads without torch, so that scripts are written and errors are shown at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.experiments.config import flag, non_negative, override
from common.vision.config import DataConfig, FactorizationConfig, LowRankTrainingConfig

DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110, 1202)}


@dataclass(kw_only=True)
class ResNetConfig(LowRankTrainingConfig):
    """A run of resnet_cifar/train.py."""

    program: ClassVar[str] = "resnet_cifar"
    description: ClassVar[str] = "Train a ResNet on small images, dense or factorized."
    layers: ClassVar[str] = "both convolutions of every block"
    needing: ClassVar[tuple[str, ...]] = (*LowRankTrainingConfig.needing, "no_frob", "square", "dump_frobnorms", "normalize")

    arch: str = flag("resnet32", "-a", "--arch", choices=list(DEPTHS), help="network")
    data: str = override(DataConfig, "data", choices=("digits", "cifar10", "cifar100", "fashion_mnist", "imagefolder"))
    no_frob: bool = flag(False, group=FactorizationConfig.group, help="no decay on the factors, even with --wd2fd")
    square: bool = flag(False, group=FactorizationConfig.group, help="three factors U M V^T (deep) instead of two")
    residual: float = flag(
        0.0,
        group=FactorizationConfig.group,
        type=non_negative,
        metavar="STD",
        help="standard deviation of noise added to the initial M",
    )
    dump_frobnorms: bool = flag(
        False,
        group=FactorizationConfig.group,
        changes_result=False,
        help="write each layer's norm after each step to frobnorms.tensor",
    )
    normalize: Path | None = flag(
        None,
        group=FactorizationConfig.group,
        type=Path,
        metavar="FILE",
        input_file=True,
        help="after each step, rescale layers to the norms in this file",
    )

    def resolve(self) -> None:
        super().resolve()
        if self.dump_frobnorms and self.normalize:
            raise ValueError("--dump-frobnorms and --normalize exclude each other: the norms of a replay are those of its file")
        if self.residual and not self.square:
            raise ValueError(f"--residual {self.residual} is noise on M, the middle of three factors: give --square too")

    def run_name(self) -> str:
        return f"{self.arch}-{self.data}"
