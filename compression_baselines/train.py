"""Train ResNet32 or VGG19 at a budget of parameters: dense or low-rank, with spectral initialization and Frobenius decay.

Prints the path of the run's result.json on stdout; all else goes to stderr.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from common import FactorizationReport, FrobeniusDecay, LowRankConfig, factorize_, param_groups, rank_scale_for_ratio
from common.norms import weight_statistics
from common.runs import clean_errors, seed_everything, write_json
from common.vision import distributed, session
from common.vision.training import Trainer
from compression_baselines import measure
from compression_baselines.flags import PROGRAM, parse
from compression_baselines.models import build, fan_out_init, is_factorized

# Mean and standard deviation of a channel, as the released code normalizes; digits and image folders as CIFAR-10.
STATISTICS = {
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "tiny_imagenet": ((0.48024579, 0.44807218, 0.39754775), (0.27698641, 0.26906449, 0.28208191)),
}
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    architecture = {key: getattr(args, key) for key in measure.ARCHITECTURE}
    statistics = STATISTICS.get(args.data, CIFAR10)
    with clean_errors(f"{PROGRAM}/train.py"):
        if args.dry_run:
            seed_everything(args.seed)
            _, report = make_model(args, architecture, session.load_dense(args))
            print(session.describe(PROGRAM, args, report))
            return
        processes = session.start(args)
        if args.evaluate:
            session.evaluate_checkpoint(args, processes, architecture, build, statistics=statistics)
            return

        # The run is checked now and begun once all else has proved right; files that flags name are read before the data.
        directory = session.save_dir(PROGRAM, args, f"{args.network}{args.depth}-{args.data}")
        checkpoint = session.find_checkpoint(args.resume, directory)
        dense = session.load_dense(args)
        needs = [measure.FILE] * args.measure + [session.FOLDED] * args.densify
        run = session.open_run(PROGRAM, args, processes, directory, needs)
        if run is None:
            return

        # Data and model.
        data = session.load_data(args, processes, statistics=statistics)
        if args.network == "vgg" and data.image_size < 32:
            raise ValueError(
                f"vgg halves its images five times and needs 32 pixels, got {data.image_size}: give --image-size 32"
            )
        architecture["num_classes"] = data.classes
        seed_everything(args.seed)
        model, report = make_model(args, architecture, dense)
        model.to(processes.device)
        layers: dict[str, Any] = {layer.name: model.get_submodule(layer.name) for layer in report.layers}

        # Optimizer and decay: what Frobenius decay covers gets no weight decay.
        decay = FrobeniusDecay(model, args.weight_decay) if args.wd2fd else None
        groups = param_groups(model, weight_decay=args.weight_decay, decay=decay)
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)

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
            statistics=partial(weight_statistics, layers),
        )
        if checkpoint is not None:
            trainer.load_state_dict(checkpoint)
        run.begin()

    session.announce(processes, report, groups, decay)
    with run.recorded():
        metrics = trainer.fit()
        if args.measure and processes.main:
            costs = measure.costs(copy.deepcopy(model), build(architecture), data.image_size)
            write_json(run.path / measure.FILE, costs)
            measure.show(costs)
        if args.densify:
            metrics["densified"] = session.fold(trainer)
        result = session.finish(trainer, metrics, report, groups)
    distributed.stop()
    if processes.main:
        print(result)


def make_model(
    args: argparse.Namespace, architecture: Mapping[str, Any], dense: dict[str, torch.Tensor] | None
) -> tuple[nn.Module, FactorizationReport]:
    """The network of the flags: built, filled with the weights of --pretrained, and factorized."""
    model = build(architecture)
    session.fill(model, dense, args.pretrained)
    if not (args.rank_scale or args.target_ratio):
        return model, session.dense_report(model)
    scale = args.rank_scale or rank_scale_for_ratio(model, args.target_ratio, filter_fn=is_factorized)
    init = args.init
    if init == "regular":
        init = fan_out_init if args.network == "vgg" and not args.kaiming else "kaiming"
    return model, factorize_(model, LowRankConfig(scale, init=init), filter_fn=is_factorized)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """A tenth at one half and again at three quarters of the epochs."""
    return args.lr * 0.1 ** sum(epoch >= share * args.epochs for share in (0.5, 0.75))


if __name__ == "__main__":
    main()
