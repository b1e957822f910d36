"""Base classes of the image programs: :class:`common.experiments.experiment.Experiment` with images and a dense network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..experiments import checkpoints, distributed
from ..experiments.experiment import Experiment, find_checkpoint
from ..surgery import densify_, load_factorized_
from .config import ImageRunConfig, LowRankTrainingConfig
from .data import Data, load
from .training import Trainer, evaluate

FOLDED = "densified.pt"  # written by --densify

C = TypeVar("C", bound=ImageRunConfig)
L = TypeVar("L", bound=LowRankTrainingConfig)


class ImageExperiment(Experiment[C, Trainer]):
    """One run of an image program.

    architecture:  the argument from which :meth:`build` makes the dense network; every checkpoint stores it with the weights.
    data:          the data set, loaded before :meth:`make_trainer` is called.
    trainer:       the trainer that :meth:`new_trainer` made last.
    """

    data: Data

    def __init__(self, config: C) -> None:
        if isinstance(config, LowRankTrainingConfig) and not isinstance(self, LowRankExperiment):
            raise TypeError(f"{type(self).__name__} would ignore --pretrained and --densify: derive it from LowRankExperiment")
        super().__init__(config)
        self.architecture = self.make_architecture()

    # Methods that a program overrides.

    def make_architecture(self) -> dict[str, Any]:
        """The argument of :meth:`build`; its ``num_classes`` is set after the data are loaded."""
        raise NotImplementedError

    def build(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The dense network of an architecture."""
        raise NotImplementedError

    def data_options(self) -> dict[str, Any]:
        """Options of :func:`common.vision.data.load` that are specific to this program."""
        return {}

    # What all image programs share.

    def load(self) -> None:
        self.data = self.load_data()
        self.architecture["num_classes"] = self.data.classes

    def load_data(self) -> Data:
        """The data set that the flags name. Raises ValueError or OSError if it is missing or has another number of classes."""
        config = self.config
        with self.processes.main_first():
            data = load(
                config.data,
                config.data_dir,
                image_size=config.image_size,
                workers=config.workers,
                device=self.processes.device,
                **self.data_options(),
            )
        if config.num_classes not in (None, data.classes):
            raise ValueError(f"{config.data} in {config.data_dir} has {data.classes} classes, expected {config.num_classes}")
        return data

    def new_trainer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, schedule: Callable[[int], float], **options: Any
    ) -> Trainer:
        """A :class:`Trainer` for this run. ``schedule`` maps an epoch to its learning rate; ``options`` go to the trainer."""
        options = {"config": self.config, "architecture": self.architecture, "schedule": schedule, **options}
        self.trainer = Trainer(model, self.data, self.run, processes=self.processes, optimizer=optimizer, **options)
        return self.trainer

    def rebuild(self, state: Mapping[str, Any], path: Path) -> nn.Module:
        """The model of a checkpoint. If other code wrote it without an architecture, this experiment's is used."""
        return rebuild(state, path, self.architecture, self.build)

    def evaluate_checkpoint(self) -> None:
        """Print accuracy and loss of the model that --resume names, as JSON."""
        config = self.config
        if config.resume == "auto" and config.save_dir is None:
            raise ValueError("--evaluate --resume auto needs --save-dir, the folder of the run to evaluate")
        path = Path(cast(Path, config.save_dir) if config.resume == "auto" else cast(str, config.resume))
        state = find_checkpoint(config.resume, path)
        if state is None:
            raise ValueError(f"there is no checkpoint in {path}")
        data = self.load_data()
        self.architecture["num_classes"] = data.classes
        classes = state.get("architecture", self.architecture)["num_classes"]
        if classes != data.classes:
            raise ValueError(f"{path} distinguishes {classes} classes, but {config.data} has {data.classes}")
        measured = evaluate(self.rebuild(state, path).to(self.processes.device), data, self.processes)
        if self.processes.main:
            print(json.dumps(measured))
        distributed.stop()


class LowRankExperiment(ImageExperiment[L]):
    """An experiment that can start from trained dense weights (--pretrained) and fold the trained factors (--densify)."""

    @cached_property
    def pretrained(self) -> dict[str, Tensor] | None:
        """The weights of --pretrained, or None if it is not given."""
        path = self.config.pretrained
        return None if path is None else checkpoints.model_state(checkpoints.load(path), path)

    def read_inputs(self) -> None:
        _ = self.pretrained

    def outputs(self) -> list[str]:
        return [FOLDED] * self.config.densify

    def build_fresh(self) -> nn.Module:
        """The dense network with its own initialization, without --pretrained."""
        return self.build(self.architecture)

    def build_dense(self) -> nn.Module:
        """The dense network, with the weights of --pretrained if given. Raises ValueError if they do not fit."""
        model = self.build_fresh()
        if self.pretrained is not None and load_factorized_(model, self.pretrained).layers:
            path = self.config.pretrained
            raise ValueError(f"--pretrained {path} is already factorized: give a dense checkpoint, or --resume this one")
        return model

    def train(self) -> dict[str, float]:
        metrics = self.trainer.fit()
        if self.config.densify:
            metrics["densified"] = self.fold()
        return metrics

    def fold(self) -> float:
        """Fold the trained factors into ordinary layers, write densified.pt, and return the folded model's accuracy."""
        model = self.trainer.model
        densify_(model)
        if self.processes.main:
            state = {"architecture": self.trainer.architecture, "model": model.state_dict()}
            checkpoints.save_file(self.run.path / FOLDED, state)
        return evaluate(model, self.data, self.processes)["accuracy"]


def rebuild(state: Mapping[str, Any], path: Path, architecture: Mapping[str, Any], build: Any) -> nn.Module:
    """The model of a checkpoint. ``architecture`` is used if other code wrote the checkpoint without one.

    ``build`` makes the dense network of an architecture. Raises ValueError if another program wrote the checkpoint.
    """
    held = state.get("architecture", architecture)
    for key in (*architecture, *held):
        if key not in held or key not in architecture:
            side = "lacks" if key not in held else "has"
            raise ValueError(f"{path} was written by another program: its architecture {side} {key!r}")
    model = build(held)
    load_factorized_(model, checkpoints.model_state(state, path))
    return model
