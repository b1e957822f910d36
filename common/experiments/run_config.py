"""Configurations that all training programs share: the training loop, and the execution of a run. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .config import Config, a_path, flag, natural, non_negative, positive_int


@dataclass(kw_only=True)
class TrainingConfig(Config):
    """Flags of the training loop."""

    group: ClassVar[str | None] = "training"

    max_steps: int | None = flag(None, type=positive_int, metavar="N", help="stop after N optimizer steps in total")
    batch_size: int = flag(
        128, "-b", "--batch-size", type=positive_int, metavar="N", help="batch size, in total over all processes"
    )
    lr: float = flag(0.1, "--lr", "--learning-rate", type=non_negative, help="initial learning rate")
    weight_decay: float = flag(
        1e-4, "--weight-decay", "--wd", type=non_negative, help="also the coefficient of Frobenius decay (--wd2fd)"
    )
    amp: str = flag("off", choices=("off", "bf16", "fp16"), help="mixed precision")
    half: bool = flag(False, changes_result=False, help="short for --amp fp16")
    compile: bool = flag(False, help="compile the network with torch.compile")
    seed: int = flag(0, type=natural, changes_result=False, help="seed of initialization, data order and augmentation")

    def resolve(self) -> None:
        super().resolve()
        if self.half:
            if self.amp == "bf16":
                raise ValueError("--half means --amp fp16, so it and --amp bf16 exclude each other: give one")
            self.amp, self.half = "fp16", False


def _checkpoint(text: str) -> str:
    return text if text == "auto" else str(a_path(text))


@dataclass(kw_only=True)
class RunConfig(TrainingConfig):
    """Flags that say where a run is stored and how it is executed. None of them changes its result."""

    group: ClassVar[str | None] = "run"

    device: str = flag("auto", changes_result=False, help="auto, cpu, cuda, cuda:1, mps, or the number of a GPU")
    save_dir: Path | None = flag(
        None,
        "--save-dir",
        "--log-dir",
        type=Path,
        changes_result=False,
        help="directory of the run (default: results/<program>/<row or run>/<configuration>)",
    )
    save_every: int = flag(1, type=positive_int, metavar="N", changes_result=False, help="save a checkpoint every N epochs")
    resume: str | None = flag(
        None,
        type=_checkpoint,
        metavar="PATH",
        changes_result=False,
        help="checkpoint to resume from; a folder means the newest valid one in it, and 'auto' that of the save-dir, if any",
    )
    evaluate: bool = flag(
        False, "-e", "--evaluate", changes_result=False, help="only evaluate the checkpoint that --resume names"
    )
    dry_run: bool = flag(False, changes_result=False, help="build the model, print it as JSON and stop; needs no data")
    eager: bool = flag(
        False,
        changes_result=False,
        help="on a GPU, launch the kernels of a training step one by one instead of recording them once as a CUDA graph",
    )
    tensorboard: bool = flag(False, changes_result=False, help="also write TensorBoard events to the save-dir")
    print_freq: int = flag(
        50,
        "-p",
        "--print-freq",
        type=positive_int,
        metavar="N",
        changes_result=False,
        help="update the progress display every N steps",
    )
    row: str | None = flag(None, changes_result=False, help="name of the table row this run is for")
    row_config: str | None = flag(
        None, changes_result=False, help="hash of the row's configuration; if it differs, the result belongs to no row"
    )

    def resolve(self) -> None:
        super().resolve()
        if self.evaluate and not self.resume:
            raise ValueError("--evaluate needs --resume PATH: the checkpoint to evaluate")
        if self.evaluate and self.dry_run:
            raise ValueError("--evaluate and --dry-run exclude each other: --dry-run builds a new model and evaluates nothing")
