"""Train a ResNet on small images: dense, low-rank, deep or wide, with spectral initialization and Frobenius decay.

Prints the path of the run's result.json on stdout; all else goes to stderr.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from common import (
    FactorizationReport,
    FrobeniusDecay,
    LowRankConfig,
    checkpoints,
    distributed,
    factorize_,
    param_groups,
    rank_scale_for_ratio,
)
from common.norms import NormRecorder, NormReplay, load_record, weight_statistics
from common.runs import FAILURES, clean_errors, seed_everything
from common.vision import session
from common.vision.training import Trainer
from resnet_cifar.flags import DEPTHS, PROGRAM, parse
from resnet_cifar.models import build, is_factorized

NORMS = "frobnorms.tensor"  # written by --dump-frobnorms


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    architecture = {"arch": args.arch, "num_classes": args.num_classes}
    with clean_errors(f"{PROGRAM}/train.py"):
        if args.dry_run:
            seed_everything(args.seed)
            _, report = make_model(args, architecture, session.load_dense(args))
            print(session.describe(PROGRAM, args, report))
            return
        processes = session.start(args)
        if args.evaluate:
            session.evaluate_checkpoint(args, processes, architecture, build_dense)
            return

        # The run is checked now and begun once all else has proved right; files that flags name are read before the data.
        directory = session.save_dir(PROGRAM, args, f"{args.arch}-{args.data}")
        checkpoint = session.find_checkpoint(args.resume, directory)
        dense = session.load_dense(args)
        record = load_record(args.normalize) if args.normalize else None
        needs = [NORMS] * args.dump_frobnorms + [session.FOLDED] * args.densify
        run = session.open_run(PROGRAM, args, processes, directory, needs)
        if run is None:
            return

        # Data and model.
        data = session.load_data(args, processes)
        architecture["num_classes"] = data.classes
        seed_everything(args.seed)
        model, report = make_model(args, architecture, dense)
        model.to(processes.device)
        layers: dict[str, Any] = {name: module for name, module in model.named_modules() if is_factorized(module, name)}

        # Optimizer and decay: what Frobenius decay covers gets no weight decay, and with --no-frob the factors get neither.
        decay = FrobeniusDecay(model, args.weight_decay) if args.wd2fd and not args.no_frob else None
        undecayed = 0.0 if args.no_frob else None
        groups = param_groups(model, weight_decay=args.weight_decay, decay=decay, factor_weight_decay=undecayed)
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
            architecture=architecture,
            optimizer=optimizer,
            schedule=partial(learning_rate, args),
            decay=decay,
            hook=hook,
            statistics=partial(weight_statistics, layers),
        )
        if checkpoint is not None:
            trainer.load_state_dict(checkpoint)
        run.begin()

    session.announce(processes, groups, decay, report)
    with clean_errors(f"{PROGRAM}/train.py", FAILURES), run.recorded():
        metrics = trainer.fit()
        if isinstance(hook, NormRecorder) and processes.main:
            checkpoints.save_file(run.path / NORMS, hook.state_dict())
        if args.densify:
            metrics["densified"] = session.fold(trainer)
        result = session.finish(trainer, metrics, report.to_dict()["parameters"], groups)
    distributed.stop()
    if processes.main:
        print(result)


def build_dense(architecture: Mapping[str, Any]) -> nn.Module:
    return build(architecture["arch"], architecture["num_classes"])


def make_model(
    args: argparse.Namespace, architecture: Mapping[str, Any], dense: dict[str, torch.Tensor] | None
) -> tuple[nn.Module, FactorizationReport]:
    """The network of the flags: built, filled with the weights of --pretrained, and factorized."""
    model = build_dense(architecture)
    session.fill(model, dense, args.pretrained)
    if not (args.rank_scale or args.target_ratio):
        return model, session.dense_report(model)
    depth = 3 if args.square else 2
    scale = args.rank_scale or rank_scale_for_ratio(model, args.target_ratio, filter_fn=is_factorized, depth=depth)
    init = {"regular": "kaiming"}.get(args.init, args.init)
    config = LowRankConfig(scale, init=init, depth=depth, residual=args.residual)
    return model, factorize_(model, config, filter_fn=is_factorized)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Tenth at one half and at three quarters of the epochs; networks of 56 and more layers warm up at a tenth for one."""
    drops = sum(epoch >= share * args.epochs for share in (0.5, 0.75))
    warmup = 0.1 if epoch == 0 and DEPTHS[args.arch] >= 56 else 1.0
    return args.lr * 0.1**drops * warmup


if __name__ == "__main__":
    main()
