"""What the image programs do alike around their models: processes, run, data, checkpoints, evaluation and result."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import checkpoints, distributed
from common.decay import FrobeniusDecay
from common.distributed import Processes
from common.runs import ROOT, Run, config_hash, environment
from common.surgery import FactorizationReport, count_parameters, densify_, load_factorized_
from common.vision.data import Data, load
from common.vision.flags import configuration, inputs
from common.vision.training import Trainer, evaluate

FOLDED = "densified.pt"  # written by --densify

Build = Callable[[Mapping[str, Any]], nn.Module]  # from the architecture that checkpoints keep to the dense network


def start(args: argparse.Namespace) -> Processes:
    """The processes that train together; raises ValueError where the flags ask for what they cannot do."""
    processes = distributed.start(args.device)
    if args.amp == "fp16" and processes.device.type == "cpu":
        raise ValueError("--amp fp16 (--half) needs a GPU: on a CPU use --amp bf16, if it has bfloat16")
    if args.amp == "bf16" and not distributed.has_bfloat16(processes.device):
        raise ValueError("--amp bf16: this processor has no bfloat16 convolutions, float32 is far faster: leave the flag out")
    if args.batch_size % processes.world_size:
        raise ValueError(f"--batch-size {args.batch_size} does not split over {processes.world_size} processes")
    return processes


def save_dir(program: str, args: argparse.Namespace, name: str) -> Path:
    """Directory of the run: --save-dir, or one that its row (or ``name``), configuration and seed determine."""
    hash = config_hash(configuration(program, args))
    return args.save_dir or ROOT / "results" / program / (args.row or name) / hash / f"seed{args.seed}"


def open_run(
    program: str, args: argparse.Namespace, processes: Processes, directory: Path, needs: Sequence[str] = ()
) -> Run | None:
    """The run in a directory, checked but not yet begun, or None where it has finished: then its result is printed.

    Raises ValueError where the directory is another run's, or is finished without one of the files it ``needs``.
    """
    run = Run(
        directory,
        configuration(program, args),
        args.seed,
        inputs=inputs(args),
        resume=args.resume is not None,
        row=args.row,
        row_config=args.row_config,
        main=processes.main,
    )
    if not processes.any(run.finished):
        return run
    for name in needs:
        if not (directory / name).exists():
            raise ValueError(f"{directory} holds a finished run without {name}: choose another --save-dir")
    if processes.main:
        print(f"{directory} holds a finished run of this configuration and seed: nothing to do", file=sys.stderr)
        print(directory / "result.json")
    distributed.stop()
    return None


def load_data(args: argparse.Namespace, processes: Processes, **options: Any) -> Data:
    """The data set of the flags; raises ValueError or OSError where it is missing or has another number of classes."""
    with processes.main_first():
        data = load(
            args.data, args.data_dir, image_size=args.image_size, workers=args.workers, device=processes.device, **options
        )
    if args.num_classes not in (None, data.classes):
        raise ValueError(f"{args.data} in {args.data_dir} has {data.classes} classes, expected {args.num_classes}")
    return data


def find_checkpoint(resume: str | None, directory: Path) -> dict[str, Any] | None:
    """The checkpoint that --resume names: a file, or with "auto" the newest good one of the directory, if any."""
    if resume is None:
        return None
    return checkpoints.newest(directory) if resume == "auto" else checkpoints.load(Path(resume))


def load_dense(args: argparse.Namespace) -> dict[str, torch.Tensor] | None:
    """Weights of --pretrained."""
    return checkpoints.model_state(checkpoints.load(args.pretrained), args.pretrained) if args.pretrained else None


def fill(model: nn.Module, dense: dict[str, torch.Tensor] | None, path: Path | None) -> None:
    """Put the weights of --pretrained into a dense model; raises ValueError where they do not fit or are factorized."""
    if dense is not None and load_factorized_(model, dense).layers:
        raise ValueError(f"--pretrained {path} is factorized already: give a dense checkpoint, or --resume this one")


def dense_report(model: nn.Module) -> FactorizationReport:
    """The report of a model that is left dense."""
    count = count_parameters(model)
    return FactorizationReport((), count, count)


def describe(program: str, args: argparse.Namespace, report: FactorizationReport) -> str:
    """What --dry-run prints: one JSON object of configuration, factorized layers and parameter counts."""
    return json.dumps({"config": {**configuration(program, args), "seed": args.seed}, **report.to_dict()})


def rebuild(state: Mapping[str, Any], path: Path, architecture: Mapping[str, Any], build: Build) -> nn.Module:
    """The model of a checkpoint from it alone, or from ``architecture`` where it is another code's and tells none."""
    held = state.get("architecture", architecture)
    for key in (*architecture, *held):
        if key not in held or key not in architecture:
            side = "lacks" if key not in held else "has"
            raise ValueError(f"{path} is of another program: its architecture {side} {key!r}")
    model = build(held)
    load_factorized_(model, checkpoints.model_state(state, path))
    return model


def evaluate_checkpoint(
    args: argparse.Namespace, processes: Processes, architecture: Mapping[str, Any], build: Build, **options: Any
) -> None:
    """Print accuracy and loss of the model that --resume names, as JSON."""
    if args.resume == "auto" and args.save_dir is None:
        raise ValueError("--evaluate --resume auto needs --save-dir: the run to evaluate")
    path = Path(args.save_dir if args.resume == "auto" else args.resume)
    state = find_checkpoint(args.resume, path)
    if state is None:
        raise ValueError(f"there is no checkpoint in {path}")
    data = load_data(args, processes, **options)
    architecture = {**architecture, "num_classes": data.classes}
    classes = state.get("architecture", architecture)["num_classes"]
    if classes != data.classes:
        raise ValueError(f"{path} tells {classes} classes apart, and {args.data} has {data.classes}")
    model = rebuild(state, path, architecture, build).to(processes.device)
    measured = evaluate(model, data, processes)
    if processes.main:
        print(json.dumps(measured))
    distributed.stop()


def announce(
    processes: Processes,
    groups: list[dict[str, Any]],
    decay: FrobeniusDecay | None = None,
    report: FactorizationReport | None = None,
) -> None:
    """Say on stderr what was factorized, if anything, and which parameters get which decay."""
    if not processes.main:
        return
    if report is not None:
        print(report, file=sys.stderr)
    for entry in decays(groups, decay):
        print("decay:", json.dumps(entry), file=sys.stderr)


def decays(groups: list[dict[str, Any]], decay: FrobeniusDecay | None) -> list[dict[str, Any]]:
    """The decay of each group of parameters, as results record it."""
    entries = [{"group": g["name"], "tensors": len(g["params"]), "weight_decay": g["weight_decay"]} for g in groups]
    if decay is not None:
        entries.append({"group": "factors", "tensors": len(decay.parameters()), "frobenius_decay": decay.coef})
    return entries


def fold(trainer: Trainer) -> float:
    """Fold the trained factors into ordinary layers, write densified.pt, and return the folded model's accuracy."""
    densify_(trainer.model)
    if trainer.processes.main:
        state = {"architecture": trainer.architecture, "model": trainer.model.state_dict()}
        checkpoints.save_file(trainer.run.path / FOLDED, state)
    return evaluate(trainer.model, trainer.data, trainer.processes)["accuracy"]


def finish(trainer: Trainer, metrics: dict[str, float], parameters: Mapping[str, float], groups: list[dict[str, Any]]) -> Path:
    """Write the result of a run; returns its path. ``parameters`` holds original, compressed and ratio."""
    seconds = metrics.pop("seconds")
    return trainer.run.finish(
        metrics=metrics,
        parameters=parameters,
        decays=decays(groups, trainer.decay),
        seconds=seconds,
        environment=environment(trainer.processes.device, trainer.processes.world_size),
    )
