"""Prune the channels or eigendirections of a trained network by its Fisher information, then fine-tune what is left.

Prints the path of the run's result.json on stdout; all else goes to stderr.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from common import checkpoints, distributed, param_groups
from common.distributed import Processes
from common.runs import FAILURES, Run, clean_errors, seed_everything
from common.surgery import count_parameters
from common.vision import session
from common.vision.data import Data
from common.vision.training import Trainer, evaluate
from compression_baselines import measure, recipe
from compression_baselines.flags import PROGRAM, parse_prune
from compression_baselines.pruners import channels, eigenbasis, fisher
from compression_baselines.pruners.select import Ranking, removed_for_budget
from compression_baselines.structure import Kept, architecture, build, convolutions, fix_rotations_

TUNING_SEED = 1 << 32  # is added to --seed: the dense run with it, most likely, saw that seed's order and crops already


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_prune(argv)
    shape = architecture(args)
    statistics = recipe.statistics(args.data)
    with clean_errors(f"{PROGRAM}/prune.py"):
        if args.dry_run:
            model = load_dense(args, shape)
            check_budget(model, args, count_parameters(model))
            print(session.describe(PROGRAM, args, session.dense_report(model)))
            return
        processes = session.start(args)
        if args.evaluate:
            session.evaluate_checkpoint(args, processes, shape, build, statistics=statistics)
            return

        # The run is checked now and begun once all else has proved right; files that flags name are read before the data.
        directory = session.save_dir(PROGRAM, args, f"{args.method}-{args.network}{args.depth}-{args.data}")
        checkpoint = session.find_checkpoint(args.resume, directory)
        if args.num_classes is not None:
            load_dense(args, shape)
        run = session.open_run(PROGRAM, args, processes, directory, [measure.FILE] * args.measure)
        if run is None:
            return

        # Data, the dense network, and the first round of pruning or the network to go on from.
        data = session.load_data(args, processes, statistics=statistics)
        recipe.check_image_size(args, data.image_size)
        shape["num_classes"] = data.classes
        seed_everything(args.seed)
        model = load_dense(args, shape)
        original = count_parameters(model)
        check_budget(model, args, original)
        if checkpoint is None:
            model.to(processes.device)
            shape["pruned"] = prune_(model, args, data, None, original, 1)
            shape["pruned"]["accuracy"] = evaluate(model, data, processes)["accuracy"]
        else:
            model = session.rebuild(checkpoint, directory, shape, build).to(processes.device)
            shape = dict(checkpoint.get("architecture", shape))
            if shape["pruned"] is None:
                raise ValueError("the checkpoint to resume from is of a dense network: give it as --pretrained")
        trainer = make_trainer(model, data, run, args, processes, shape)
        if checkpoint is not None:
            trainer.load_state_dict(checkpoint)
        run.begin()

    session.announce(processes, trainer.optimizer.param_groups)
    with clean_errors(f"{PROGRAM}/prune.py", FAILURES), run.recorded():
        while True:
            if processes.main:
                share = f"{count_parameters(model):,} of {original:,} parameters"
                print(f"round {shape['pruned']['round']}: {share}, {shape['pruned']['accuracy']:.2f} %", file=sys.stderr)
            metrics = trainer.fit() | {"pruned": shape["pruned"]["accuracy"]}
            number = shape["pruned"]["round"] + 1
            if number > args.rounds or trainer.step >= (args.max_steps or sys.maxsize):
                break
            with clean_errors(f"{PROGRAM}/prune.py"):
                shape["pruned"] = prune_(model, args, data, shape["pruned"], original, number)
            shape["pruned"]["accuracy"] = evaluate(model, data, processes)["accuracy"]
            trainer = make_trainer(model, data, run, args, processes, shape)
            trainer.step, trainer.seconds = (number - 1) * args.epochs * trainer.steps_per_epoch, metrics["seconds"]
        if args.measure and processes.main:
            measure.write(run.path, model, shape, data.image_size)
        count = count_parameters(model)
        parameters = {"original": original, "compressed": count, "ratio": count / original}
        result = session.finish(trainer, metrics, parameters, trainer.optimizer.param_groups)
    distributed.stop()
    if processes.main:
        print(result)


def make_trainer(
    model: nn.Module, data: Data, run: Run, args: argparse.Namespace, processes: Processes, shape: dict[str, Any]
) -> Trainer:
    """The trainer that fine-tunes in the round of ``shape``: whole schedule, momentum from zero, batches of its own."""
    groups = param_groups(model, weight_decay=args.weight_decay)
    changes = {"epochs": shape["pruned"]["round"] * args.epochs, "seed": args.seed + TUNING_SEED}
    return Trainer(
        model,
        data,
        run,
        argparse.Namespace(**vars(args) | changes),
        processes,
        architecture=shape,
        optimizer=torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum),
        schedule=partial(recipe.learning_rate, args),
    )


def load_dense(args: argparse.Namespace, shape: dict[str, Any]) -> nn.Module:
    """The network of --pretrained; raises ValueError where it is missing or not the network of the flags."""
    state = checkpoints.load(args.pretrained)
    held = state.get("architecture", {})
    for key in ("network", "depth", "width", "num_classes"):
        if key in held and shape[key] is not None and held[key] != shape[key]:
            raise ValueError(f"--pretrained {args.pretrained} has {key} {held[key]}, and the flags ask for {shape[key]}")
    if held.get("pruned") is not None:
        raise ValueError(f"--pretrained {args.pretrained} is pruned already: give the checkpoint of a dense run of train.py")
    model = build(shape)
    session.fill(model, checkpoints.model_state(state, args.pretrained), args.pretrained)
    broken = next((name for name, value in model.state_dict().items() if not value.isfinite().all()), None)
    if broken is not None:
        raise ValueError(f"--pretrained {args.pretrained} has diverged: {broken} is not finite")
    return model


def check_budget(model: nn.Module, args: argparse.Namespace, original: int) -> None:
    """Raise ValueError, before any work, where not even the best case of the limits reaches the budget.

    What is reached then depends on the scores: on how much the branches of a residual block keep of the same channels.
    """
    if args.target_ratio is not None:
        layers = convolutions(model).items()
        if args.method.startswith("eigendamage"):
            sides = {f"{name}/inputs": conv.in_channels for name, conv in layers}
            sides |= {f"{name}/outputs": conv.out_channels for name, conv in layers}
        else:
            sides = {name: conv.out_channels for name, conv in layers}
        # Scores that are alike in all layers let branches keep the same channels.
        limit = 1 - (1 - args.prune_ratio_limit) ** args.rounds
        ranking = Ranking({name: torch.arange(float(size)) for name, size in sides.items()}, limit)
        choose(model, args, ranking, round(args.target_ratio * original), None)


def choose(
    model: nn.Module, args: argparse.Namespace, ranking: Ranking, budget: int | None, before: Kept | None
) -> dict[str, list[int]]:
    """The units that stay: at a budget of parameters or, without one, at --ratio."""
    if budget is None:
        return ranking.kept(int(args.ratio * ranking.units))

    shape = copy.deepcopy(model).to("meta")  # the search counts many times, and weights do not matter to it

    def count(kept: dict[str, list[int]]) -> int:
        if not args.method.startswith("eigendamage"):
            return channels.count(shape, kept, before)
        separable = args.method == "eigendamage-separable"
        return eigenbasis.count(shape, eigenbasis.sizes(shape, kept, separable=separable), separable=separable)

    return ranking.kept(removed_for_budget(ranking, budget, count))


def prune_(
    model: nn.Module, args: argparse.Namespace, data: Data, pruned: dict[str, Any] | None, original: int, number: int
) -> dict[str, Any]:
    """Prune the model in place, in round ``number``; returns what rebuilds its shape.

    Rounds go down to the target by equal factors of parameters (or, with --ratio, of units).
    """
    share = number / args.rounds
    args = copy.copy(args)
    budget = None
    if args.target_ratio is not None:
        budget = round(args.target_ratio**share * original)
    else:
        args.ratio = 1 - (1 - args.ratio) ** (1 / args.rounds)
    batch_size = 32 if args.method == "c-obd" else args.batch_size  # its diagonal takes the gradient of every image
    images = fisher.loader(data, args.fisher_samples, batch_size, args.seed)
    if args.method.startswith("eigendamage"):
        separable = args.method == "eigendamage-separable"
        rotated = eigenbasis.rotate(model, images, args.fisher)
        kept = choose(model, args, eigenbasis.rank(rotated, args.prune_ratio_limit), budget, None)
        sizes = eigenbasis.sizes(model, kept, separable=separable)
        eigenbasis.prune_(model, rotated, kept, sizes, separable=separable)
        if args.fix_rotation:
            fix_rotations_(model)
        kind = "separable" if separable else "eigenbasis"
        sizes = (pruned or {"sizes": {}})["sizes"] | sizes
        return {"kind": kind, "sizes": sizes, "fix_rotation": args.fix_rotation, "round": number}
    found = channels.curvature(model, args.method, images, args.fisher)
    before = pruned["kept"] if pruned else None
    kept = choose(model, args, channels.rank(model, args.method, found, args.prune_ratio_limit), budget, before)
    channels.prune_(model, args.method, found, kept, before)
    return {"kind": "channels", "kept": channels.dense_numbers(kept, before), "round": number}


if __name__ == "__main__":
    main()
