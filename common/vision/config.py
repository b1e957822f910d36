"""Configurations of the image programs: data, run and factorization. Loads without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ..experiments.config import Config, flag, non_negative, positive_int
from ..experiments.files import ROOT
from ..experiments.run_config import RunConfig

DATASETS: dict[str, tuple[int | None, int | None]] = {  # name: (classes, image size in pixels); None: as on disk
    "digits": (10, 8),
    "cifar10": (10, 32),
    "cifar100": (100, 32),
    "fashion_mnist": (10, 32),
    "tiny_imagenet": (None, 64),  # normally 200 classes; counted on disk
    "imagefolder": (None, None),
}


@dataclass(kw_only=True)
class DataConfig(Config):
    """The data set."""

    group: ClassVar[str | None] = "data"

    data: str = flag(
        "cifar10",
        "--data",
        "--dataset",
        choices=list(DATASETS),
        help="data set; digits is embedded and needs no download",
    )
    data_dir: Path = flag(
        ROOT / "data",
        type=Path,
        changes_result=False,
        help="folder of the data sets, also for downloads; for imagefolder, the folder with train/ and test/ (or val/)",
    )
    image_size: int | None = flag(
        None, type=positive_int, help="side in pixels; smaller images are padded with zeros, those of image folders are resized"
    )
    num_classes: int | None = flag(
        None,
        type=positive_int,
        changes_result=False,
        help="number of classes of an image folder (default: counted in its train/)",
    )
    workers: int = flag(
        4, "-j", "--workers", type=positive_int, metavar="N", changes_result=False, help="threads that decode image folders"
    )

    def resolve(self) -> None:
        super().resolve()
        classes, size = DATASETS[self.data]
        if classes is not None and self.num_classes not in (None, classes):
            raise ValueError(f"--num-classes is for imagefolder: {self.data} has {classes} classes, got {self.num_classes}")
        self.num_classes = classes or self.num_classes
        if size is not None and self.image_size is not None and self.image_size < size:
            raise ValueError(f"--image-size must be at least {size} for {self.data}, got {self.image_size}")
        self.image_size = self.image_size or size

    def input_paths(self) -> dict[str, Path]:
        splits = ("train", "test", "val") if self.data == "imagefolder" else ()
        return super().input_paths() | {split: self.data_dir / split for split in splits}


@dataclass(kw_only=True)
class ImageRunConfig(RunConfig, DataConfig):
    """A run of an image program."""

    group: ClassVar[str | None] = "training"

    epochs: int = flag(200, "--epochs", "--epoch", type=positive_int, metavar="N", help="passes over the training images")
    momentum: float = flag(0.9, type=non_negative, help="momentum of SGD, in [0, 1)")

    def resolve(self) -> None:
        super().resolve()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum must be in [0, 1), got {self.momentum}")
        if self.dry_run and self.data == "tiny_imagenet":
            self.num_classes = self.num_classes or 200
        if self.dry_run and self.num_classes is None:
            raise ValueError("--dry-run with --data imagefolder needs --num-classes")

    def run_name(self) -> str:
        return f"{self.program}-{self.data}"


@dataclass(kw_only=True)
class FactorizationConfig(ImageRunConfig):
    """Which layers are factorized, and how. ``layers`` describes the layers that a program factorizes."""

    group: ClassVar[str | None] = "factorization ({cls.layers})"
    layers: ClassVar[str] = ""
    needing: ClassVar[tuple[str, ...]] = ("spectral", "init", "wd2fd")  # fields that need factorized layers

    rank_scale: float = flag(
        0.0, type=non_negative, help="rank as a multiple of out_channels * kernel; 0 leaves the network dense"
    )
    target_ratio: float = flag(0.0, type=non_negative, help="instead of --rank-scale: share of the parameters to keep")
    spectral: bool = flag(False, changes_result=False, help="spectral initialization, short for --init spectral")
    init: Literal["regular", "spectral", "norm-matched"] = flag(
        None, choices=("regular", "spectral", "norm-matched"), help="initialization (default: regular)"
    )
    wd2fd: bool = flag(False, help="Frobenius decay on the factors in place of their weight decay")

    @property
    def factorized(self) -> bool:
        """Whether anything is factorized."""
        return bool(self.rank_scale or self.target_ratio)

    def resolve(self) -> None:
        super().resolve()
        if self.rank_scale and self.target_ratio:
            raise ValueError(
                f"--rank-scale {self.rank_scale} and --target-ratio {self.target_ratio} exclude each other: give one"
            )
        largest = max(self.rank_scale, self.target_ratio)
        if largest > 100:
            raise ValueError(f"--rank-scale and --target-ratio are at most 100, got {largest:g}")
        if self.spectral and self.init not in (None, "spectral"):
            raise ValueError(f"--spectral and --init {self.init} exclude each other: give one")
        for name in () if self.factorized else self.needing:
            if getattr(self, name) not in (None, False, "regular"):
                flag_name = "--" + name.replace("_", "-")
                raise ValueError(f"{flag_name} needs factorized layers: give --rank-scale or --target-ratio above 0")
        self.init = "spectral" if self.spectral else self.init or "regular"
        self.spectral = False


@dataclass(kw_only=True)
class LowRankTrainingConfig(FactorizationConfig):
    """Factorization of a dense network, which may already be trained, and folding of the trained factors.

    A program with these flags derives from :class:`common.vision.experiment.LowRankExperiment`.
    """

    group: ClassVar[str | None] = FactorizationConfig.group
    pretrained: Path | None = flag(
        None,
        type=Path,
        metavar="FILE",
        input_file=True,
        help="dense checkpoint to load before factorizing; factorized layers keep its weights only with --spectral",
    )
    densify: bool = flag(
        False, changes_result=False, help="also fold the trained factors, and evaluate and save the folded model"
    )
    needing: ClassVar[tuple[str, ...]] = (*FactorizationConfig.needing, "densify")
