"""The skeleton of training programs: what a run does whatever its model, data and method are.

A program derives from :class:`Experiment` and defines what is its own: configuration, data, model, optimizer and decay, hooks
and result. :meth:`Experiment.main` does the rest: it reads the flags, checks everything before any work is done, loads the
data, trains, records, evaluates and resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from ..surgery import FactorizationReport
from . import checkpoints, distributed
from .distributed import Processes
from .run_config import RunConfig
from .runs import FAILURES, Run, clean_errors, directory_of, environment, run_of, seed_everything
from .training import TrainingLoop

C = TypeVar("C", bound=RunConfig)
T = TypeVar("T", bound=TrainingLoop)


class Experiment(Generic[C, T]):
    """One run of a training program.

    config:        the resolved flags, of ``config_class``.
    processes, run, checkpoint:  set before :meth:`make_trainer` is called; ``checkpoint`` is the one to resume from.
    trainer:       the training loop, set by :meth:`make_trainer`.
    report:        what was factorized, where :meth:`make_trainer` sets it.
    """

    config_class: type[C]
    processes: Processes
    run: Run
    trainer: T

    def __init__(self, config: C) -> None:
        self.config = config
        self.checkpoint: dict[str, Any] | None = None
        self.report: FactorizationReport | None = None

    # Methods that a program overrides.

    def make_model(self) -> tuple[nn.Module, FactorizationReport]:
        """The network to train, and what was factorized; also what --dry-run describes."""
        raise NotImplementedError

    def load(self) -> None:
        """Load the data; raises ValueError or OSError where it is missing or does not fit the flags."""
        raise NotImplementedError

    def make_trainer(self) -> T:
        """The training loop, with model, optimizer, decay and hooks. The random generators are seeded before."""
        raise NotImplementedError

    def evaluate_checkpoint(self) -> None:
        """Print what the model that --resume names scores, as JSON."""
        raise NotImplementedError

    def read_inputs(self) -> None:
        """Read the files that flags name, so that what is wrong with them is said before the data is loaded."""

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
            experiment.load()
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
        config = self.config
        directory = directory_of(config)
        self.checkpoint = find_checkpoint(config.resume, directory)
        self.read_inputs()
        self.run = run_of(config, main=self.processes.main)
        if not self.processes.any(self.run.finished):
            return True
        for name in self.outputs():
            if not (directory / name).exists():
                raise ValueError(f"{directory} holds a finished run without {name}: remove it, or choose another --save-dir")
        if self.processes.main:
            self.run.say_finished()
        distributed.stop()
        return False

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


def decays(trainer: TrainingLoop) -> list[dict[str, Any]]:
    """The decay of each group of parameters, as results record it."""
    groups, decay = trainer.optimizer.param_groups, trainer.decay
    entries = [{"group": g["name"], "tensors": len(g["params"]), "weight_decay": g["weight_decay"]} for g in groups]
    if decay is not None:
        entries.append({"group": "factors", "tensors": len(decay.parameters()), "frobenius_decay": decay.coef})
    return entries
