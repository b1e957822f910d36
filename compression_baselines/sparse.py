"""Train a network with a given number of non-zero weights, chosen before or during training.

Prints the path of the run's result.json on stdout; all else goes to stderr.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from common.experiments.config import say_interrupted
from compression_baselines.config import SparseConfig

if __name__ == "__main__":
    say_interrupted(SparseConfig.prog())
    SparseConfig.parse()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

from torch import nn

from common import FactorizationReport, param_groups
from common.budget import count_parameters, least_ratio
from common.experiments import checkpoints
from common.vision.data import Batch, Data
from common.vision.training import Trainer, sgd
from compression_baselines.experiment import CompressionExperiment, learning_rate, start_classifier_
from compression_baselines.masks import METHODS
from compression_baselines.masks.base import Masks, Settings, weights_of


class SparseExperiment(CompressionExperiment[SparseConfig]):
    """One run: the steps that :class:`common.vision.experiment.ImageExperiment` leaves to a program."""

    config_class = SparseConfig

    def make_model(self) -> tuple[nn.Module, FactorizationReport]:
        """The network before it is masked, and its non-zeros at the budget. Raises ValueError if that cannot be reached."""
        model = self.build(self.architecture)
        start_classifier_(model, self.config)
        ratio, parameters = cast(float, self.config.target_ratio), count_parameters(model)
        budget(model, ratio)
        return model, FactorizationReport((), original=parameters, compressed=round(ratio * parameters))

    def make_trainer(self) -> Trainer:
        config, data = self.config, self.data
        self.check_image_size()
        model, report = self.make_model()
        model.to(self.processes.device)
        self.parameters = report.original
        steps_per_epoch = data.steps_per_epoch(config.batch_size, self.processes.world_size)
        settings = make_settings(config, budget(model, cast(float, config.target_ratio)), steps_per_epoch)

        # Masks, and the method that chooses them: first below, then as a hook of the trainer.
        dense = copy.deepcopy(model)
        self.masks = Masks(model)
        method = METHODS[config.method](self.masks, settings)
        groups = param_groups(model, weight_decay=config.weight_decay)
        optimizer = sgd(groups, config, self.processes.device)
        self.masks.optimizer = optimizer

        trainer = self.new_trainer(
            model,
            optimizer,
            config=replace(config, epochs=config.epochs * (config.rounds or 1)),
            schedule=partial(learning_rate, config),
            hook=method,
            epoch_metrics=lambda lr: {"nonzero": self.nonzero(), "density": self.nonzero() / self.parameters},
            best_from=method.best_from(),
        )
        if self.checkpoint is None:
            method.start(dense, first_batches(config, data))
        return trainer

    def nonzero(self) -> int:
        """Number of parameters of the network that are not masked."""
        weights = sum(size.numel() for size in self.masks.sizes().values())
        return self.parameters - weights + self.masks.nonzero()

    def announce(self) -> None:
        super().announce()
        if self.processes.main:
            text = f"{self.config.method}: starts with {self.nonzero():,} of {self.parameters:,} parameters"
            print(text, file=sys.stderr)

    def train(self) -> dict[str, float]:
        metrics = self.trainer.fit()
        if self.config.measure:
            folded = self.build(self.architecture).to(self.processes.device)
            folded.load_state_dict(checkpoints.model_state({"model": self.trainer.model.state_dict()}, self.run.path))
            self.measure(folded)
        return metrics

    def count(self) -> dict[str, Any]:
        nonzero = self.nonzero()
        return {"original": self.parameters, "compressed": nonzero, "ratio": nonzero / self.parameters, "nonzero": nonzero}


def budget(model: nn.Module, ratio: float) -> int:
    """Number of weights that the masks keep, so that the model, unmasked parameters included, has ``ratio`` of its parameters.

    Raises ValueError, naming the floor, if not every layer could keep a weight.
    """
    parameters = count_parameters(model)
    layers = weights_of(model).values()
    dense = parameters - sum(weight.numel() for weight in layers)
    nonzero = round(ratio * parameters) - dense
    if nonzero < len(layers):
        floor = least_ratio(dense + len(layers), parameters)
        raise ValueError(
            f"--target-ratio {ratio:g} cannot be reached: normalizations and biases have {dense:,} of the {parameters:,} "
            f"parameters, and each of {len(layers)} layers keeps a weight: a ratio of {floor:g} in all"
        )
    return nonzero


def make_settings(config: SparseConfig, nonzero: int, steps_per_epoch: int) -> Settings:
    """The settings of the method: its flags, and the length of the training."""
    length: dict[str, Any] = {"nonzero": nonzero, "steps": config.epochs * steps_per_epoch, "steps_per_epoch": steps_per_epoch}
    flags = {field.name: getattr(config, field.name) for field in fields(Settings) if field.name not in length}
    return Settings(**length, **flags)


def first_batches(config: SparseConfig, data: Data) -> list[Batch]:
    """The first training batches, from which SNIP and GraSP compute scores; by default about 10 images per class."""
    count = config.score_batches or math.ceil(10 * data.classes / config.batch_size)
    count = min(count, data.steps_per_epoch(config.batch_size))
    return [data.train_batch(config.seed, 0, step, config.batch_size) for step in range(count)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    SparseExperiment.main(argv)


if __name__ == "__main__":
    main()
