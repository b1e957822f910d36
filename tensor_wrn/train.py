"""Train WideResNets with ordinary, low-rank, Tensor-Train or Tucker convolutions, alone or with a teacher.

Prints the path of the run's result.json on stdout; all else goes to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from common.experiments.config import say_interrupted
from tensor_wrn.config import WideResNetConfig

if __name__ == "__main__":
    say_interrupted(WideResNetConfig.prog())
    WideResNetConfig.parse()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

import torch
from torch import Tensor, nn

from common import FactorizationReport, FrobeniusDecay, param_groups
from common.experiments import checkpoints
from common.norms import norm_metrics
from common.vision.data import CIFAR10, CIFAR100, Batch
from common.vision.experiment import ImageExperiment, rebuild
from common.vision.training import Trainer, sgd
from tensor_wrn.distillation import distillation_loss
from tensor_wrn.factorize import factorized_layers, make_model
from tensor_wrn.models import BasicBlock, build


class WideResNetExperiment(ImageExperiment[WideResNetConfig]):
    """One run: the steps that :class:`common.vision.experiment.ImageExperiment` leaves to a program."""

    config_class = WideResNetConfig

    def make_architecture(self) -> dict[str, Any]:
        config = self.config
        scale = config.rank_scale if config.form != "Conv" and config.rank_scale else None  # otherwise make_model computes it
        sizes = {"depth": config.wrn_depth, "width": config.wrn_width, "num_classes": config.num_classes}
        return {**sizes, "form": config.form, "rank_scale": scale, "tensor_shapes": config.tensor_shapes}

    def build(self, architecture: Mapping[str, Any]) -> nn.Module:
        return build(architecture)

    def rebuild(self, state: Mapping[str, Any], path: Path) -> nn.Module:
        return super().rebuild(with_shapes(state), path)

    def data_options(self) -> dict[str, Any]:
        normalization = CIFAR100 if self.config.data == "cifar100" else CIFAR10
        return {"normalization": normalization, "cutout": self.config.cutout}

    def read_inputs(self) -> None:
        self.teacher = load_teacher(self.config.teacher) if self.config.teacher is not None else None

    def make_model(self) -> tuple[nn.Module, FactorizationReport]:
        """The network of ordinary, low-rank or tensor convolutions, from a spectral, regular or norm-matched initialization."""
        return make_model(self.config, self.architecture)

    def make_trainer(self) -> Trainer:
        config = self.config
        model, self.report = self.make_model()
        model.to(self.processes.device)

        # Decay of the factors: Frobenius, or weight decay that is scaled by the compression rate (crs), plain or none.
        kind, _, shortcuts = config.decay.partition("+")
        decay = FrobeniusDecay(model, config.weight_decay) if kind in ("frobenius", "none") else None
        scaled = config.weight_decay * self.report.ratio if kind == "crs" else None
        groups = param_groups(model, weight_decay=config.weight_decay, decay=decay, factor_weight_decay=scaled)
        optimizer = sgd(groups, config, self.processes.device)
        if kind == "none":
            decay = None
        elif shortcuts:
            decay = FrobeniusDecay(shortcuts_of(model), config.weight_decay)

        return self.new_trainer(
            model,
            optimizer,
            schedule=partial(learning_rate, config),
            decay=decay,
            epoch_metrics=partial(norm_metrics, factorized_layers(model)),
            loss=self.make_loss(),
        )

    def make_loss(self) -> Callable[[nn.Module, Batch], tuple[Tensor, Tensor]] | None:
        """A student's loss; None means cross-entropy. Raises ValueError if the teacher has another number of classes."""
        if self.teacher is None:
            return None
        config, classes = self.config, self.architecture["num_classes"]
        known = cast(nn.Linear, self.teacher.fc).out_features
        if known != classes:
            raise ValueError(f"the teacher {config.teacher} distinguishes {known} classes, but {config.data} has {classes}")
        return distillation(config, self.teacher.to(self.processes.device))


def distillation(config: WideResNetConfig, teacher: nn.Module) -> Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]:
    """The loss of a student, from the labels, the teacher's outputs, and its attention after each stage."""
    teacher.eval().requires_grad_(False)

    def loss(student: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, activations = student(batch.images, activations=True)
        with torch.no_grad():
            answers, shown = teacher(batch.images, activations=True)
        strength = {"temperature": config.temperature, "alpha": config.alpha, "beta": config.beta}
        return distillation_loss(logits, activations, answers, shown, batch.labels, **strength), logits

    return loss


def learning_rate(config: WideResNetConfig, epoch: int) -> float:
    """The learning rate, multiplied by --lr-decay-ratio at each epoch of --epoch-step."""
    return config.lr * config.lr_decay_ratio ** sum(epoch >= step for step in config.epoch_step)


def shortcuts_of(model: nn.Module) -> nn.ModuleList:
    """The shortcut convolutions."""
    blocks = (module for module in model.modules() if isinstance(module, BasicBlock))
    return nn.ModuleList(block.shortcut for block in blocks if block.shortcut is not None)


def load_teacher(path: Path) -> nn.Module:
    """The teacher, rebuilt from its checkpoint alone. Raises ValueError if it is missing or from another program."""
    state = checkpoints.load(path)
    if "architecture" not in state:
        raise ValueError(f"{path} does not record its architecture: give the checkpoint.pt of a run of this program")
    keys = ("depth", "width", "num_classes", "form", "rank_scale", "tensor_shapes")
    return rebuild(with_shapes(state), path, dict.fromkeys(keys), build)


def with_shapes(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The checkpoint. One from before there were two rules of shapes gets the rule "nearest"."""
    if "architecture" not in state:
        return state
    return {**state, "architecture": {"tensor_shapes": "nearest", **state["architecture"]}}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    WideResNetExperiment.main(argv)


if __name__ == "__main__":
    main()
