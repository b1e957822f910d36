"""Configuration of the WideResNet experiments; loads without torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common.experiments.config import REQUIRED, derived, flag, natural, non_negative, override
from common.experiments.run_config import RunConfig, TrainingConfig
from common.vision.config import DataConfig, FactorizationConfig
from tensor_wrn.shapes import RULES, alike

DATASETS = ("cifar10", "cifar100", "digits", "fashion_mnist", "imagefolder")
FORMS = ("Conv", "TensorTrain", "Tucker", "TuckerTT")


def _forms() -> str:
    *others, last = (form if form == "Conv" else f"{form}_R" for form in FORMS)
    return f"{', '.join(others)} or {last}"


def _milestones(text: str) -> list[int]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    rising = isinstance(value, list) and all(type(item) is int and item > 0 for item in value) and value == sorted(set(value))
    if not rising:
        raise argparse.ArgumentTypeError(f"must be a list of increasing epochs such as [60,120,160], got {text!r}")
    return value


@dataclass(kw_only=True)
class WideResNetConfig(FactorizationConfig):
    """A run of tensor_wrn/train.py.

    ``form`` and ``rank_scale`` are derived from --conv, ``save_dir`` and ``teacher`` from -t and -s, and ``decay`` from the
    flags that choose how the factors decay.
    """

    program: ClassVar[str] = "tensor_wrn"
    description: ClassVar[str] = "Train WideResNets with low-rank or tensor convolutions."
    layers: ClassVar[str] = "every convolution of the blocks"
    needing: ClassVar[tuple[str, ...]] = (*FactorizationConfig.needing, "decay_shortcuts")

    dataset: str = flag(REQUIRED, "dataset", choices=DATASETS, changes_result=False, help="data set")
    mode: str = flag(
        REQUIRED,
        "mode",
        choices=("teacher", "student"),
        help="train on labels alone, or also on a teacher's attention and outputs",
    )
    wrn_depth: int = flag(40, type=int, help="depth of the network, 6n + 4")
    wrn_width: float = flag(2, type=float, help="channels of the stages, as a multiple of 16, 32 and 64")
    data: str = override(
        DataConfig,
        "data",
        None,
        choices=DATASETS,
        help="replaces the first argument, for instance to try a row's script on digits",
    )
    weight_decay: float = override(TrainingConfig, "weight_decay", 5e-4)
    device: str = override(RunConfig, "device", names=("--device", "--GPU"))
    epoch_step: list[int] = flag(
        [60, 120, 160], type=_milestones, metavar="LIST", help="epochs at which the learning rate drops"
    )
    lr_decay_ratio: float = flag(0.2, type=non_negative, help="factor of the learning rate at each drop")
    cutout: int | None = flag(None, type=natural, metavar="PIXELS", help="side of the cutout (default: half the image)")
    teacher_checkpoint: Path | None = flag(
        None,
        "-t",
        "--teacher-checkpoint",
        type=Path,
        metavar="DIR",
        changes_result=False,
        help="for a student, the teacher's run; for a teacher, its save-dir",
    )
    student_checkpoint: Path | None = flag(
        None,
        "-s",
        "--student-checkpoint",
        type=Path,
        metavar="DIR",
        changes_result=False,
        help="for a student, its save-dir",
    )
    teacher: Path | None = derived(None, input_file=True)

    conv: str = flag(
        "Conv",
        group=FactorizationConfig.group,
        metavar="FORM",
        changes_result=False,
        help=f"{_forms()} with rank scale R in (0, 1]",
    )
    form: str = derived(REQUIRED)
    tensor_shapes: str = flag(
        None,
        group=FactorizationConfig.group,
        choices=RULES,
        before="nearest",
        help="rule for the shapes of the 3-way tensors: the released code's, or the divisors nearest to the roots (default: "
        "released); if both give the same shapes, as at width 10, runs are the same, too, and are recorded as nearest",
    )
    rank_scale: float = override(
        FactorizationConfig, "rank_scale", help="the same as R; for Conv, rank as a multiple of out_channels * kernel"
    )
    init: Any = override(
        FactorizationConfig,
        "init",
        choices=("regular", "spectral", "norm-matched", "released"),
        help="initialization (default: regular); released, for tensors, is what the released code calls regular",
    )
    wd2fd: bool = override(FactorizationConfig, "wd2fd", changes_result=False)
    nocrswd: bool = flag(
        False,
        group=FactorizationConfig.group,
        changes_result=False,
        help="do not scale weight decay on the factors by the compression (CRS)",
    )
    no_frob: bool = flag(
        False, group=FactorizationConfig.group, changes_result=False, help="with --wd2fd: no decay on the factors"
    )
    decay_shortcuts: bool = flag(
        False,
        group=FactorizationConfig.group,
        changes_result=False,
        help="Conv without --wd2fd: Frobenius decay on the shortcuts on top of their weight decay, as in the released code",
    )
    decay: str = derived(REQUIRED)

    temperature: float = flag(
        None, group="student", type=non_negative, help="temperature of the teacher's and the student's outputs (default: 4)"
    )
    alpha: float = flag(
        None, group="student", type=non_negative, help="weight of the teacher's outputs, in [0, 1] (default: 0)"
    )
    beta: float = flag(None, group="student", type=non_negative, help="weight of the attention transfer (default: 1000)")

    def resolve(self) -> None:
        self.data = self.data or self.dataset
        self._read_form()
        super().resolve()
        if self.wrn_depth < 10 or self.wrn_depth % 6 != 4:
            raise ValueError(f"--wrn-depth must be 6n + 4 and at least 10, got {self.wrn_depth}")
        if not 1 / 16 <= self.wrn_width <= 100:
            raise ValueError(f"--wrn-width must be between 1/16 and 100, got {self.wrn_width:g}")
        if self.form == "Conv" and self.tensor_shapes == "released":
            raise ValueError("--tensor-shapes is for tensors, got --conv Conv")
        # If both rules agree, record the one that predates the choice: results of the same computation stay together.
        same = self.form == "Conv" or alike(self.wrn_width)
        self.tensor_shapes = "nearest" if same else self.tensor_shapes or "released"
        self._resolve_student()
        self._resolve_decay()
        self._resolve_directories()

    def _read_form(self) -> None:
        form, _, scale = self.conv.partition("_")
        if form not in FORMS or (scale and form == "Conv"):
            raise ValueError(f"--conv must be {_forms()} with R in (0, 1], got {self.conv!r}")
        if scale:
            try:
                value = float(scale)
            except ValueError:
                value = 0.0
            if not 0 < value <= 1:
                raise ValueError(f"--conv must be {_forms()} with R in (0, 1], got {self.conv!r}")
            if self.factorized:
                raise ValueError(f"--conv {self.conv} sets the rank scale: leave out --rank-scale and --target-ratio")
            self.rank_scale = value
        self.form = self.conv = form
        tensors = form != "Conv"
        if tensors and not self.factorized:
            raise ValueError(
                f"--conv {form} needs a rank scale: --conv {form}_R with R in (0, 1], --rank-scale or --target-ratio"
            )
        if tensors and self.rank_scale > 1:
            raise ValueError(f"--rank-scale of {form} must be at most 1, got {self.rank_scale:g}")
        if self.init == "released" and not tensors:
            raise ValueError("--init released is for tensors: for Conv, the released code's initialization is --init regular")

    def _resolve_student(self) -> None:
        for name, default in (("temperature", 4.0), ("alpha", 0.0), ("beta", 1e3)):
            if self.mode == "teacher" and getattr(self, name) is not None:
                raise ValueError(f"--{name} is for the mode student")
            if self.mode == "student" and getattr(self, name) is None:
                setattr(self, name, default)
        if self.mode == "student" and (self.alpha > 1 or self.temperature == 0):
            raise ValueError(
                f"--alpha must be in [0, 1] and --temperature above 0, got {self.alpha:g} and {self.temperature:g}"
            )

    def _resolve_decay(self) -> None:
        if self.wd2fd and self.nocrswd:
            raise ValueError("--wd2fd and --nocrswd exclude each other: Frobenius decay replaces weight decay")
        if self.no_frob and not self.wd2fd:
            raise ValueError("--no-frob needs --wd2fd: it removes the decay that --wd2fd puts in place of weight decay")
        if self.wd2fd:
            self.decay = "none" if self.no_frob else "frobenius"
        else:
            self.decay = "plain" if self.nocrswd or not self.factorized else "crs"
        if self.decay_shortcuts:
            if self.form != "Conv" or self.wd2fd:
                raise ValueError(
                    "--decay-shortcuts is for Conv without --wd2fd: otherwise shortcuts are dense or have Frobenius decay"
                )
            self.decay += "+shortcuts"

    def _resolve_directories(self) -> None:
        """Move the values of -t and -s to ``teacher`` and ``save_dir``."""
        teacher, student = self.teacher_checkpoint, self.student_checkpoint
        self.teacher_checkpoint = self.student_checkpoint = None
        if self.mode == "teacher":
            if student is not None:
                raise ValueError(f"-s {student} is for the mode student: a teacher is written to -t")
            self.save_dir = _one(self.save_dir, teacher, "-t")
            return
        if teacher is not None:
            self.teacher = teacher if teacher.suffix == ".pt" else teacher / "checkpoint.pt"
        if self.teacher is None:
            raise ValueError("the mode student needs -t DIR, the folder of the teacher's run")
        self.save_dir = _one(self.save_dir, student, "-s")

    def run_name(self) -> str:
        return f"{self.form}-wrn{self.wrn_depth}-{self.wrn_width:g}-{self.data}"


def _one(save_dir: Path | None, short: Path | None, name: str) -> Path | None:
    if save_dir is not None and short is not None:
        raise ValueError(f"--save-dir {save_dir} and {name} {short} name the directory twice: give one")
    return save_dir or short
