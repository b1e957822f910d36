"""The skeleton of training programs: the parts of a run that do not depend on its model, data or method.

A program derives from :class:`Experiment` and defines its configuration, data, model, optimizer and decay, hooks and result.
:meth:`Experiment.main` does the rest: it reads the flags, checks everything before any work is done, loads the data, trains,
records, evaluates and resumes.
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
    processes, run, checkpoint:  set before :meth:`make_trainer` is called. ``checkpoint`` is the one to resume from, or None.
    trainer:       the training loop, set by :meth:`make_trainer`.
    report:        what was factorized. None unless :meth:`make_trainer` sets it.
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
        """The network to train, and a report of what was factorized. --dry-run prints the report."""
        raise NotImplementedError

    def load(self) -> None:
        """Load the data. Raises ValueError or OSError if the data is missing or does not fit the flags."""
        raise NotImplementedError

    def make_trainer(self) -> T:
        """The training loop, with model, optimizer, decay and hooks. :meth:`main` seeds the random generators first."""
        raise NotImplementedError

    def evaluate_checkpoint(self) -> None:
        """Print the scores of the model that --resume names, as JSON."""
        raise NotImplementedError

    def read_inputs(self) -> None:
        """Read the files that flags name, so that errors in them are reported before the data is loaded."""

    def train(self) -> dict[str, float]:
        """Train to the end. Returns the metrics for the result."""
        return self.trainer.fit()

    def count(self) -> dict[str, Any]:
        """Numbers of parameters for the result: ``original``, ``compressed`` and their ``ratio``."""
        if self.report is None:
            raise TypeError(f"{type(self).__name__} must set self.report in make_trainer() or override count()")
        return self.report.to_dict()["parameters"]

    def outputs(self) -> list[str]:
        """Names of the files that a finished run holds in addition to its result."""
        return []

    # Methods that all programs share.

    @classmethod
    def main(cls, argv: Sequence[str] | None = None) -> None:
        """Run the program. For a training run, stdout gets only the path of the result; all else goes to stderr."""
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
            # The run is checked now. It begins only after everything else has been checked.
            if not experiment.open_run():
                return
            experiment.load()
            seed_everything(config.seed)
            trainer = experiment.make_trainer()
            if experiment.checkpoint is not None:
                trainer.load_state_dict(experiment.checkpoint)
            experiment.count()  # fails now, not after the training, if the program forgot to set the report
            experiment.run.begin()
        experiment.announce()
        with clean_errors(config.prog(), FAILURES), experiment.run.recorded():
            result = experiment.finish(experiment.train())
        distributed.stop()
        if experiment.processes.main:
            print(result)

    def describe(self) -> str:
        """The output of --dry-run: one JSON object with the configuration, factorized layers and numbers of parameters."""
        seed_everything(self.config.seed)
        _, report = self.make_model()
        return json.dumps({"config": {**self.config.record(), "seed": self.config.seed}, **report.to_dict()})

    def open_run(self) -> bool:
        """Find the run's directory, its checkpoint and its input files, and check them.

        Returns False if the run has already finished; the path of its result is then printed. Raises ValueError if the
        directory belongs to another run, or if the run has finished but one of its :meth:`outputs` is missing.
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
                raise ValueError(
                    f"{directory} holds a finished run without {name}: remove the run or choose another --save-dir"
                )
        if self.processes.main:
            self.run.say_finished()
        distributed.stop()
        return False

    def announce(self) -> None:
        """Report on stderr what was factorized, if anything, and which decay each group of parameters gets."""
        if self.processes.main:
            if self.report is not None:
                print(self.report, file=sys.stderr)
            for entry in decays(self.trainer):
                print("decay:", json.dumps(entry), file=sys.stderr)

    def finish(self, metrics: dict[str, float]) -> Path:
        """Write the result. Returns its path."""
        seconds = metrics.pop("seconds")
        return self.run.finish(
            metrics=metrics,
            parameters=self.count(),
            decays=decays(self.trainer),
            seconds=seconds,
            environment=environment(self.processes.device, self.processes.world_size) | self.contractions(),
        )

    def contractions(self) -> dict[str, Any]:
        """The contractions of the factorized layers, for the result's environment. Empty unless they were measured."""
        return {} if self.trainer.contractions is None else {"contractions": self.trainer.contractions}


def start_processes(config: RunConfig) -> Processes:
    """The processes that train together. Raises ValueError if the device or the processes do not support the flags."""
    processes = distributed.start(config.device)
    if config.amp == "fp16" and processes.device.type == "cpu":
        raise ValueError("--amp fp16 (--half) needs a GPU: on a CPU with bfloat16, use --amp bf16")
    if config.amp == "bf16" and not distributed.has_bfloat16(processes.device):
        raise ValueError(
            "--amp bf16 would be far slower than float32, since this processor has no bfloat16 convolutions: leave the flag out"
        )
    if config.batch_size % processes.world_size:
        raise ValueError(
            f"--batch-size {config.batch_size} must be a multiple of {processes.world_size}, the number of processes"
        )
    return processes


def find_checkpoint(resume: str | None, directory: Path) -> dict[str, Any] | None:
    """The checkpoint that --resume names, or None.

    With "auto", it is the newest checkpoint in ``directory`` that loads, if any. A path goes to :func:`checkpoints.load`.
    """
    if resume is None:
        return None
    return checkpoints.newest(directory) if resume == "auto" else checkpoints.load(Path(resume))


def decays(trainer: TrainingLoop) -> list[dict[str, Any]]:
    """The decay of each group of parameters, in the form that results record."""
    groups, decay = trainer.optimizer.param_groups, trainer.decay
    entries = [{"group": g["name"], "tensors": len(g["params"]), "weight_decay": g["weight_decay"]} for g in groups]
    if decay is not None:
        entries.append({"group": "factors", "tensors": len(decay.parameters()), "frobenius_decay": decay.coef})
    return entries
