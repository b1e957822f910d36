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

from common import (
    FactorizationReport,
    FrobeniusDecay,
    LowRankConfig,
    distributed,
    factorize_,
    param_groups,
    rank_scale_for_ratio,
)
from common.norms import weight_statistics
from common.runs import FAILURES, clean_errors, seed_everything
from common.vision import session
from common.vision.training import Trainer
from compression_baselines import measure, recipe
from compression_baselines.flags import PROGRAM, parse
from compression_baselines.models import fan_out_init, is_factorized
from compression_baselines.structure import architecture as architecture_of
from compression_baselines.structure import build


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    architecture = architecture_of(args)
    statistics = recipe.statistics(args.data)
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
        recipe.check_image_size(args, data.image_size)
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
            schedule=partial(recipe.learning_rate, args),
            decay=decay,
            statistics=partial(weight_statistics, layers),
        )
        if checkpoint is not None:
            trainer.load_state_dict(checkpoint)
        run.begin()

    session.announce(processes, groups, decay, report)
    with clean_errors(f"{PROGRAM}/train.py", FAILURES), run.recorded():
        metrics = trainer.fit()
        if args.measure and processes.main:
            measure.write(run.path, copy.deepcopy(model), architecture, data.image_size)
        if args.densify:
            metrics["densified"] = session.fold(trainer)
        result = session.finish(trainer, metrics, report.to_dict()["parameters"], groups)
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


if __name__ == "__main__":
    main()
