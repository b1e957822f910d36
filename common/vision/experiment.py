"""The skeleton of the image programs: what a run does whatever its network and method are.

A program derives from :class:`Experiment` and says what is its own: configuration, network, optimizer and decay, hooks and
result. :meth:`Experiment.main` does the rest: it reads the flags, checks everything before any work is done, loads the data,
trains, records, evaluates and resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from ..experiments import checkpoints, distributed
from ..experiments.distributed import Processes
from ..experiments.runs import FAILURES, Run, clean_errors, directory_of, environment, seed_everything
from ..surgery import FactorizationReport, densify_, load_factorized_
from .config import LowRankTrainingConfig, RunConfig
from .data import Data, load
from .training import Trainer, evaluate

FOLDED = "densified.pt"  # written by --densify

C = TypeVar("C", bound=RunConfig)
L = TypeVar("L", bound=LowRankTrainingConfig)


class Experiment(Generic[C]):
    """One run of an image program.

    config:        the resolved flags, of ``config_class``.
    architecture:  what rebuilds the dense network; kept in every checkpoint beside the weights.
    processes, run, data, checkpoint:  set before :meth:`make_trainer` is called; ``checkpoint`` is the one to resume from.
    trainer:       the latest that :meth:`new_trainer` made.
    report:        what was factorized, where :meth:`make_trainer` sets it.
    """

    config_class: type[C]
    processes: Processes
    run: Run
    data: Data
    trainer: Trainer

    def __init__(self, config: C) -> None:
        if isinstance(config, LowRankTrainingConfig) and not isinstance(self, LowRankExperiment):
            raise TypeError(f"{type(self).__name__} would ignore --pretrained and --densify: derive it from LowRankExperiment")
        self.config = config
        self.architecture = self.make_architecture()
        self.checkpoint: dict[str, Any] | None = None
        self.report: FactorizationReport | None = None

    # Methods that a program overrides.

    def make_architecture(self) -> dict[str, Any]:
        """What rebuilds the dense network; its ``num_classes`` is set once the data is loaded."""
        raise NotImplementedError

    def build(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The dense network of an architecture."""
        raise NotImplementedError

    def make_model(self) -> tuple[nn.Module, FactorizationReport]:
        """The network to train, and what was factorized; also what --dry-run describes."""
        raise NotImplementedError

    def make_trainer(self) -> Trainer:
        """Network, optimizer, decay and hooks, by way of :meth:`new_trainer`. The random generators are seeded before."""
        raise NotImplementedError

    def read_inputs(self) -> None:
        """Read the files that flags name, so that what is wrong with them is said before the data is loaded."""

    def data_options(self) -> dict[str, Any]:
        """Options of :func:`common.vision.data.load` that are this program's own."""
        return {}

    def train(self) -> dict[str, float]:
        """Train to the end; returns the metrics for the result."""
        return self.trainer.fit()

    def count(self) -> dict[str, Any]:
        """Parameters for the result: original, compressed and ratio."""
        if self.report is None:
            raise TypeError(f"{type(self).__name__}.make_trainer must set self.report, or count() be overridden")
        return self.report.to_dict()["parameters"]

    def outputs(self) -> list[str]:
        """Names of the files that a finished run has beside its result."""
        return []

    # What all programs share.

    @classmethod
    def main(cls, argv: Sequence[str] | None = None) -> None:
        """Run the program. Prints the path of the result on stdout; all else goes to stderr."""
        config = cls.config_class.parse(argv)
        with clean_errors(config.prog()):
            experiment = cls(config)
            if config.dry_run:
                print(experiment.describe())
                return
            experiment.processes = start_processes(config)
            if config.evaluate:
                experiment.evaluate_checkpoint()
                return
            # The run is checked now and begun once all else has proved right.
            if not experiment.open_run():
                return
            experiment.data = experiment.load_data()
            experiment.architecture["num_classes"] = experiment.data.classes
            seed_everything(config.seed)
            trainer = experiment.make_trainer()
            if experiment.checkpoint is not None:
                trainer.load_state_dict(experiment.checkpoint)
            experiment.count()  # what a program forgot to set is missed now, and not after the training
            experiment.run.begin()
        experiment.announce()
        with clean_errors(config.prog(), FAILURES), experiment.run.recorded():
            result = experiment.finish(experiment.train())
        distributed.stop()
        if experiment.processes.main:
            print(result)

    def describe(self) -> str:
        """What --dry-run prints: one JSON object of configuration, factorized layers and parameter counts."""
        seed_everything(self.config.seed)
        _, report = self.make_model()
        return json.dumps({"config": {**self.config.record(), "seed": self.config.seed}, **report.to_dict()})

    def open_run(self) -> bool:
        """Find the run's directory and what it needs; False where it has finished: then its result is printed.

        Raises ValueError where the directory is another run's, or is finished without one of its :meth:`outputs`.
        """
        config, record = self.config, self.config.record()
        directory = directory_of(config)
        self.checkpoint = find_checkpoint(config.resume, directory)
        self.read_inputs()
        self.run = Run(
            directory,
            record,
            config.seed,
            kind=type(config),
            inputs=config.inputs(),
            resume=config.resume is not None,
            row=config.row,
            row_config=config.row_config,
            main=self.processes.main,
        )
        if not self.processes.any(self.run.finished):
            return True
        for name in self.outputs():
            if not (directory / name).exists():
                raise ValueError(f"{directory} holds a finished run without {name}: remove it, or choose another --save-dir")
        if self.processes.main:
            print(f"{directory} holds a finished run of this configuration and seed: nothing to do", file=sys.stderr)
            print(directory / "result.json")
        distributed.stop()
        return False

    def load_data(self) -> Data:
        """The data set of the flags; raises ValueError or OSError where it is missing or has another number of classes."""
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
        """A :class:`Trainer` of this run; ``schedule`` gives the learning rate of an epoch, ``options`` are its others."""
        options = {"config": self.config, "architecture": self.architecture, "schedule": schedule, **options}
        self.trainer = Trainer(model, self.data, self.run, processes=self.processes, optimizer=optimizer, **options)
        return self.trainer

    def rebuild(self, state: Mapping[str, Any], path: Path) -> nn.Module:
        """The model of a checkpoint. A checkpoint that records no architecture, as of other code, has this experiment's."""
        return rebuild(state, path, self.architecture, self.build)

    def evaluate_checkpoint(self) -> None:
        """Print accuracy and loss of the model that --resume names, as JSON."""
        config = self.config
        if config.resume == "auto" and config.save_dir is None:
            raise ValueError("--evaluate --resume auto needs --save-dir: the run to evaluate")
        path = Path(cast(Path, config.save_dir) if config.resume == "auto" else cast(str, config.resume))
        state = find_checkpoint(config.resume, path)
        if state is None:
            raise ValueError(f"there is no checkpoint in {path}")
        data = self.load_data()
        self.architecture["num_classes"] = data.classes
        classes = state.get("architecture", self.architecture)["num_classes"]
        if classes != data.classes:
            raise ValueError(f"{path} tells {classes} classes apart, and {config.data} has {data.classes}")
        measured = evaluate(self.rebuild(state, path).to(self.processes.device), data, self.processes)
        if self.processes.main:
            print(json.dumps(measured))
        distributed.stop()

    def announce(self) -> None:
        """Say on stderr what was factorized, if anything, and which parameters get which decay."""
        if self.processes.main:
            if self.report is not None:
                print(self.report, file=sys.stderr)
            for entry in decays(self.trainer):
                print("decay:", json.dumps(entry), file=sys.stderr)

    def finish(self, metrics: dict[str, float]) -> Path:
        """Write the result; returns its path."""
        seconds = metrics.pop("seconds")
        return self.run.finish(
            metrics=metrics,
            parameters=self.count(),
            decays=decays(self.trainer),
            seconds=seconds,
            environment=environment(self.processes.device, self.processes.world_size) | self.contractions(),
        )

    def contractions(self) -> dict[str, Any]:
        """How the factorized layers were contracted, where that was measured, for the result's environment."""
        return {} if self.trainer.contractions is None else {"contractions": self.trainer.contractions}


class LowRankExperiment(Experiment[L]):
    """An experiment whose network may start from trained dense weights (--pretrained) and be folded again (--densify)."""

    @cached_property
    def pretrained(self) -> dict[str, Tensor] | None:
        """Weights of --pretrained."""
        path = self.config.pretrained
        return None if path is None else checkpoints.model_state(checkpoints.load(path), path)

    def read_inputs(self) -> None:
        _ = self.pretrained

    def outputs(self) -> list[str]:
        return [FOLDED] * self.config.densify

    def build_fresh(self) -> nn.Module:
        """The dense network as it starts without --pretrained."""
        return self.build(self.architecture)

    def build_dense(self) -> nn.Module:
        """The dense network, with the weights of --pretrained where they are given; raises ValueError where they do not fit."""
        model = self.build_fresh()
        if self.pretrained is not None and load_factorized_(model, self.pretrained).layers:
            path = self.config.pretrained
            raise ValueError(f"--pretrained {path} is factorized already: give a dense checkpoint, or --resume this one")
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


def start_processes(config: RunConfig) -> Processes:
    """The processes that train together; raises ValueError where the flags ask for what they cannot do."""
    processes = distributed.start(config.device)
    if config.amp == "fp16" and processes.device.type == "cpu":
        raise ValueError("--amp fp16 (--half) needs a GPU: on a CPU use --amp bf16, if it has bfloat16")
    if config.amp == "bf16" and not distributed.has_bfloat16(processes.device):
        raise ValueError("--amp bf16: this processor has no bfloat16 convolutions, float32 is far faster: leave the flag out")
    if config.batch_size % processes.world_size:
        raise ValueError(f"--batch-size {config.batch_size} does not split over {processes.world_size} processes")
    return processes


def find_checkpoint(resume: str | None, directory: Path) -> dict[str, Any] | None:
    """The checkpoint that --resume names: a file, or with "auto" the newest good one of the directory, if any."""
    if resume is None:
        return None
    return checkpoints.newest(directory) if resume == "auto" else checkpoints.load(Path(resume))


def rebuild(state: Mapping[str, Any], path: Path, architecture: Mapping[str, Any], build: Any) -> nn.Module:
    """The model of a checkpoint. ``architecture`` is used where the checkpoint, being of other code, records none.

    ``build`` makes the dense network of an architecture. Raises ValueError where the checkpoint is of another program.
    """
    held = state.get("architecture", architecture)
    for key in (*architecture, *held):
        if key not in held or key not in architecture:
            side = "lacks" if key not in held else "has"
            raise ValueError(f"{path} is of another program: its architecture {side} {key!r}")
    model = build(held)
    load_factorized_(model, checkpoints.model_state(state, path))
    return model


def decays(trainer: Trainer) -> list[dict[str, Any]]:
    """The decay of each group of parameters, as results record it."""
    groups, decay = trainer.optimizer.param_groups, trainer.decay
    entries = [{"group": g["name"], "tensors": len(g["params"]), "weight_decay": g["weight_decay"]} for g in groups]
    if decay is not None:
        entries.append({"group": "factors", "tensors": len(decay.parameters()), "frobenius_decay": decay.coef})
    return entries
