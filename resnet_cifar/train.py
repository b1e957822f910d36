"""Train a ResNet on small images: dense, low-rank, deep or wide, with spectral initialization and Frobenius decay.

Prints the path of the run's result.json on stdout; all else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import (
    FactorizationReport,
    FrobeniusDecay,
    LowRankConfig,
    densify_,
    factorize_,
    load_factorized_,
    param_groups,
    rank_scale_for_ratio,
)
from common.norms import NormRecorder, NormReplay, load_record, weight_statistics
from common.runs import ROOT, Run, clean_errors, config_hash, environment, seed_everything
from common.surgery import count_parameters
from common.vision import checkpoints, distributed
from common.vision.data import load
from common.vision.flags import configuration, inputs
from common.vision.training import Trainer, evaluate
from resnet_cifar.flags import DEPTHS, PROGRAM, parse
from resnet_cifar.models import build, is_factorized

NORMS = "frobnorms.tensor"  # written by --dump-frobnorms


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with clean_errors(f"{PROGRAM}/train.py"):
        if args.dry_run:
            print(json.dumps(describe(args)))
            return
        processes = distributed.start(args.device)
        if args.amp == "fp16" and processes.device.type == "cpu":
            raise ValueError("--amp fp16 (--half) needs a GPU: on a CPU use --amp bf16")
        if args.batch_size % processes.world_size:
            raise ValueError(f"--batch-size {args.batch_size} does not split over {processes.world_size} processes")
        if args.evaluate:
            measured = evaluate_checkpoint(args, processes)
            if processes.main:
                print(json.dumps(measured))
            distributed.stop()
            return

        # The run: its directory is checked now and made once everything else has proved right.
        config = configuration(PROGRAM, args)
        save_dir = args.save_dir or default_save_dir(args, config)
        # Files that flags name are read before anything that takes long.
        checkpoint = find_checkpoint(args.resume, save_dir)
        dense = load_dense(args)
        record = load_record(args.normalize) if args.normalize else None
        options = {"resume": args.resume is not None, "row": args.row, "row_config": args.row_config, "main": processes.main}
        run = Run(save_dir, config, args.seed, inputs=inputs(args), **options)
        if processes.any(run.finished):
            if args.dump_frobnorms and not (run.path / NORMS).exists():
                raise ValueError(f"{run.path} holds a finished run without {NORMS}: choose another --save-dir")
            print(f"{run.path} holds a finished run of this configuration and seed: nothing to do", file=sys.stderr)
            print_result(run.path / "result.json", processes)
            return

        # Data and model.
        with processes.main_first():
            data = load(args.data, args.data_dir, image_size=args.image_size, workers=args.workers, device=processes.device)
        if args.num_classes not in (None, data.classes):
            raise ValueError(f"--num-classes {args.num_classes}, but {args.data_dir} has {data.classes} classes")
        seed_everything(args.seed)
        model, report = build_model(args, data.classes, dense)
        model.to(processes.device)
        layers: dict[str, Any] = {name: module for name, module in model.named_modules() if is_factorized(module, name)}

        # Optimizer and decay: what Frobenius decay covers gets no weight decay, and with --no-frob the factors get neither.
        decay = FrobeniusDecay(model, args.weight_decay) if args.wd2fd and not args.no_frob else None
        groups = param_groups(
            model, weight_decay=args.weight_decay, decay=decay, factor_weight_decay=0.0 if args.no_frob else None
        )
        decays = [{"parameters": len(group["params"]), **{k: group[k] for k in ("name", "weight_decay")}} for group in groups]
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)

        hook: NormRecorder | NormReplay | None = None
        if record is not None:
            steps = args.epochs * data.steps_per_epoch(args.batch_size, processes.world_size)
            hook = NormReplay(layers, record, min(steps, args.max_steps or steps), processes.device)
        elif args.dump_frobnorms:
            hook = NormRecorder(layers)

        trainer = Trainer(
            model,
            data,
            run,
            args,
            processes,
            architecture={"arch": args.arch, "num_classes": data.classes},
            optimizer=optimizer,
            schedule=partial(learning_rate, args),
            decay=decay,
            hook=hook,
            statistics=partial(weight_statistics, layers),
        )
        if checkpoint is not None:
            trainer.load_state_dict(checkpoint)
        run.begin()

    log(processes, report, decays, decay)
    with run.recorded():
        metrics = trainer.fit()
        seconds = metrics.pop("seconds")
        if isinstance(hook, NormRecorder) and processes.main:
            checkpoints.save_file(run.path / NORMS, hook.state_dict())
        if args.densify:
            densify_(model)
            metrics["densified"] = evaluate(model, data, processes)["accuracy"]
            if processes.main:
                state = {"architecture": trainer.architecture, "model": model.state_dict()}
                checkpoints.save_file(run.path / "densified.pt", state)
        result = run.finish(
            metrics=metrics,
            parameters=report.to_dict()["parameters"],
            decays=[*decays, {"name": "frobenius", "coef": decay.coef}] if decay else decays,
            seconds=seconds,
            environment=environment(processes.device, processes.world_size),
        )
    distributed.stop()
    print_result(result, processes)


def build_model(
    args: argparse.Namespace, classes: int, dense: dict[str, torch.Tensor] | None = None
) -> tuple[nn.Module, FactorizationReport]:
    """The network of the flags: built, filled with the weights of --pretrained, and factorized."""
    model = build(args.arch, classes)
    if dense is not None and load_factorized_(model, dense).layers:
        raise ValueError(f"--pretrained {args.pretrained} is factorized already: give a dense checkpoint, or --resume this one")
    if not (args.rank_scale or args.target_ratio):
        count = count_parameters(model)
        return model, FactorizationReport((), count, count)
    depth = 3 if args.square else 2
    scale = args.rank_scale or rank_scale_for_ratio(model, args.target_ratio, filter_fn=is_factorized, depth=depth)
    init = {"regular": "kaiming"}.get(args.init, args.init)
    config = LowRankConfig(scale, init=init, depth=depth, residual=args.residual)
    return model, factorize_(model, config, filter_fn=is_factorized)


def load_dense(args: argparse.Namespace) -> dict[str, torch.Tensor] | None:
    """Weights of --pretrained."""
    return checkpoints.model_state(checkpoints.load(args.pretrained), args.pretrained) if args.pretrained else None


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Tenth at one half and at three quarters of the epochs; networks of 56 and more layers warm up at a tenth for one."""
    drops = sum(epoch >= share * args.epochs for share in (0.5, 0.75))
    warmup = 0.1 if epoch == 0 and DEPTHS[args.arch] >= 56 else 1.0
    return args.lr * 0.1**drops * warmup


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What --dry-run prints: the configuration, the factorized layers, and the parameters of the model."""
    seed_everything(args.seed)
    _, report = build_model(args, args.num_classes, load_dense(args))
    return {"config": {**configuration(PROGRAM, args), "seed": args.seed}, **report.to_dict()}


def default_save_dir(args: argparse.Namespace, config: dict[str, Any]) -> Path:
    return ROOT / "results" / PROGRAM / (args.row or f"{args.arch}-{args.data}") / config_hash(config) / f"seed{args.seed}"


def find_checkpoint(resume: str | None, directory: Path) -> dict[str, Any] | None:
    if resume is None:
        return None
    return checkpoints.newest(directory) if resume == "auto" else checkpoints.load(Path(resume))


def evaluate_checkpoint(args: argparse.Namespace, processes: distributed.Processes) -> dict[str, float]:
    """Accuracy of the model that --resume names, rebuilt from its checkpoint alone."""
    if args.resume == "auto" and args.save_dir is None:
        raise ValueError("--evaluate --resume auto needs --save-dir: the run to evaluate")
    path = Path(args.save_dir if args.resume == "auto" else args.resume)
    state = find_checkpoint(args.resume, path)
    if state is None:
        raise ValueError(f"there is no checkpoint in {path}")
    architecture = state.get("architecture", {"arch": args.arch, "num_classes": args.num_classes})
    with processes.main_first():
        data = load(args.data, args.data_dir, image_size=args.image_size, workers=args.workers, device=processes.device)
    model = build(architecture["arch"], architecture["num_classes"] or data.classes)
    load_factorized_(model, checkpoints.model_state(state, path))
    if model.linear.out_features != data.classes:
        raise ValueError(f"{path} tells {model.linear.out_features} classes apart, and {args.data} has {data.classes}")
    return evaluate(model.to(processes.device), data, processes)


def log(processes: distributed.Processes, report: FactorizationReport, decays: list[dict[str, Any]], decay: Any) -> None:
    """Say on stderr what was factorized and which parameters get which decay."""
    if not processes.main:
        return
    print(report, file=sys.stderr)
    for group in decays:
        print(f"weight decay {group['weight_decay']:g} on {group['parameters']} tensors ({group['name']})", file=sys.stderr)
    if decay is not None:
        print(f"Frobenius decay {decay.coef:g} on {len(decay.parameters())} factors", file=sys.stderr)


def print_result(path: Path, processes: distributed.Processes) -> None:
    if processes.main:
        print(path)


if __name__ == "__main__":
    main()
