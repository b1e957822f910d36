"""Train a network with a given number of non-zero weights: pruned while training, before it, or moved about during it.

Prints the path of the run's result.json on stdout; all else goes to stderr.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from common import checkpoints, distributed, param_groups
from common.runs import FAILURES, clean_errors, seed_everything
from common.surgery import count_parameters
from common.vision import session
from common.vision.data import Batch, Data
from common.vision.training import Trainer
from compression_baselines import measure, recipe
from compression_baselines.flags import PROGRAM, parse_sparse
from compression_baselines.masks import METHODS
from compression_baselines.masks.base import Masks, Settings, weights_of
from compression_baselines.structure import architecture as architecture_of
from compression_baselines.structure import build


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_sparse(argv)
    architecture = architecture_of(args)
    statistics = recipe.statistics(args.data)
    with clean_errors(f"{PROGRAM}/sparse.py"):
        if args.dry_run:
            model = build(architecture)
            budget(model, args.target_ratio)
            print(session.describe(PROGRAM, args, session.dense_report(model)))
            return
        processes = session.start(args)
        if args.evaluate:
            session.evaluate_checkpoint(args, processes, architecture, build, statistics=statistics)
            return

        # The run is checked now and begun once all else has proved right.
        directory = session.save_dir(PROGRAM, args, f"{args.method}-{args.network}{args.depth}-{args.data}")
        checkpoint = session.find_checkpoint(args.resume, directory)
        run = session.open_run(PROGRAM, args, processes, directory, [measure.FILE] * args.measure)
        if run is None:
            return

        # Data and model.
        data = session.load_data(args, processes, statistics=statistics)
        recipe.check_image_size(args, data.image_size)
        architecture["num_classes"] = data.classes
        seed_everything(args.seed)
        model = build(architecture).to(processes.device)
        parameters = count_parameters(model)

        # Masks, and the method that chooses them: as a hook of the trainer, and for the first time below.
        epochs = args.epochs * (args.rounds or 1)
        settings = make_settings(
            args, budget(model, args.target_ratio), data.steps_per_epoch(args.batch_size, processes.world_size)
        )
        dense = copy.deepcopy(model)
        masks = Masks(model)
        method = METHODS[args.method](masks, settings)
        groups = param_groups(model, weight_decay=args.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)
        masks.optimizer = optimizer
        weights = sum(size.numel() for size in masks.sizes().values())

        def nonzero() -> int:
            return parameters - weights + masks.nonzero()

        trainer = Trainer(
            model,
            data,
            run,
            argparse.Namespace(**{**vars(args), "epochs": epochs}),
            processes,
            architecture=architecture,
            optimizer=optimizer,
            schedule=partial(recipe.learning_rate, args),
            hook=method,
            statistics=lambda lr: {"nonzero": nonzero(), "density": nonzero() / parameters},
            best_from=method.best_from(),
        )
        if checkpoint is not None:
            trainer.load_state_dict(checkpoint)
        else:
            method.start(dense, first_batches(args, data))
        del dense
        run.begin()

    session.announce(processes, groups)
    if processes.main:
        print(f"{args.method}: {nonzero():,} of {parameters:,} parameters are in at first", file=sys.stderr)
    with clean_errors(f"{PROGRAM}/sparse.py", FAILURES), run.recorded():
        metrics = trainer.fit()
        if args.measure and processes.main:
            folded = build(architecture).to(processes.device)
            folded.load_state_dict(checkpoints.model_state({"model": model.state_dict()}, run.path))
            measure.write(run.path, folded, architecture, data.image_size)
        count = {"original": parameters, "compressed": nonzero(), "ratio": nonzero() / parameters, "nonzero": nonzero()}
        result = session.finish(trainer, metrics, count, groups)
    distributed.stop()
    if processes.main:
        print(result)


def budget(model: nn.Module, ratio: float) -> int:
    """Weights that the masks keep, so that with all that is not masked the model has ``ratio`` of its parameters.

    Raises ValueError, naming the floor, where the layers could not keep a weight each.
    """
    parameters = count_parameters(model)
    layers = weights_of(model).values()
    dense = parameters - sum(weight.numel() for weight in layers)
    nonzero = round(ratio * parameters) - dense
    if nonzero < len(layers):
        floor = (dense + len(layers)) / parameters
        raise ValueError(
            f"--target-ratio {ratio:g} cannot be reached: normalizations and biases have {dense:,} of the {parameters:,} "
            f"parameters and each of {len(layers)} layers keeps a weight, {floor:.4g} in all"
        )
    return nonzero


def make_settings(args: argparse.Namespace, nonzero: int, steps_per_epoch: int) -> Settings:
    """What the method is told: the flags of its own, and how long training takes."""
    names = ("distribution", "update_every", "update_until", "drop_fraction", "rounds", "rewind", "l1", "temperature")
    return Settings(
        nonzero=nonzero,
        steps=args.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        epochs=args.epochs,
        seed=args.seed,
        **{name: getattr(args, name) for name in names},
    )


def first_batches(args: argparse.Namespace, data: Data) -> list[Batch]:
    """The training's first batches, from which SNIP and GraSP score: unless told otherwise, some 10 images a class."""
    count = args.score_batches or math.ceil(10 * data.classes / args.batch_size)
    count = min(count, data.steps_per_epoch(args.batch_size))
    return [data.train_batch(args.seed, 0, step, args.batch_size) for step in range(count)]


if __name__ == "__main__":
    main()
