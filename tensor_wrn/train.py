"""Train WideResNets with ordinary, low-rank, Tensor-Train or Tucker convolutions, alone or from a teacher.

Prints the path of the run's result.json on stdout; all else goes to stderr.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common import FrobeniusDecay, checkpoints, distributed, param_groups
from common.norms import weight_statistics
from common.runs import FAILURES, clean_errors, seed_everything
from common.vision import session
from common.vision.data import CIFAR10, CIFAR100, Batch
from common.vision.training import Trainer
from tensor_wrn.distillation import distillation_loss
from tensor_wrn.factorize import factorized_layers, make_model
from tensor_wrn.flags import PROGRAM, parse
from tensor_wrn.models import BasicBlock, build


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    statistics = CIFAR100 if args.data == "cifar100" else CIFAR10
    architecture = {"depth": args.wrn_depth, "width": args.wrn_width, "num_classes": args.num_classes, "form": args.form}
    architecture["rank_scale"] = args.rank_scale if args.form != "Conv" and args.rank_scale else None  # or make_model solves it
    with clean_errors(f"{PROGRAM}/train.py"):
        if args.dry_run:
            seed_everything(args.seed)
            _, report = make_model(args, architecture)
            print(session.describe(PROGRAM, args, report))
            return
        processes = session.start(args)
        if args.evaluate:
            session.evaluate_checkpoint(args, processes, architecture, build, statistics=statistics)
            return

        # The run is checked now and begun once all else has proved right; files that flags name are read before the data.
        directory = session.save_dir(PROGRAM, args, f"{args.form}-wrn{args.wrn_depth}-{args.wrn_width:g}-{args.data}")
        checkpoint = session.find_checkpoint(args.resume, directory)
        teacher = load_teacher(args) if args.teacher is not None else None
        run = session.open_run(PROGRAM, args, processes, directory)
        if run is None:
            return

        # Data and model.
        data = session.load_data(args, processes, statistics=statistics, cutout=args.cutout)
        architecture["num_classes"] = data.classes
        seed_everything(args.seed)
        model, report = make_model(args, architecture)
        model.to(processes.device)
        loss = None
        if teacher is not None:
            check_teacher(args, teacher, architecture)
            loss = distillation(args, teacher.to(processes.device))

        # Optimizer and decay of the factors: Frobenius, scaled by the compression rate, plain or none.
        kind, _, shortcuts = args.decay.partition("+")
        decay = FrobeniusDecay(model, args.weight_decay) if kind in ("frobenius", "none") else None
        scaled = args.weight_decay * report.to_dict()["parameters"]["ratio"] if kind == "crs" else None
        groups = param_groups(model, weight_decay=args.weight_decay, decay=decay, factor_weight_decay=scaled)
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)
        if kind == "none":
            decay = None
        elif shortcuts:
            decay = FrobeniusDecay(shortcuts_of(model), args.weight_decay)

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
            statistics=partial(weight_statistics, factorized_layers(model)),
            loss=loss,
        )
        if checkpoint is not None:
            trainer.load_state_dict(checkpoint)
        run.begin()

    session.announce(processes, groups, decay, report)
    with clean_errors(f"{PROGRAM}/train.py", FAILURES), run.recorded():
        metrics = trainer.fit()
        result = session.finish(trainer, metrics, report.to_dict()["parameters"], groups)
    distributed.stop()
    if processes.main:
        print(result)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Times --lr-decay-ratio from each epoch of --epoch-step on."""
    return args.lr * args.lr_decay_ratio ** sum(epoch >= step for step in args.epoch_step)


def shortcuts_of(model: nn.Module) -> nn.ModuleList:
    """The shortcut convolutions."""
    blocks = (module for module in model.modules() if isinstance(module, BasicBlock))
    return nn.ModuleList(block.shortcut for block in blocks if block.shortcut is not None)


def load_teacher(args: argparse.Namespace) -> nn.Module:
    """The teacher from its checkpoint alone; raises ValueError where there is none, or it is of another program."""
    state = checkpoints.load(args.teacher)
    if "architecture" not in state:
        raise ValueError(f"{args.teacher} does not tell its architecture: give the checkpoint.pt of a run of this program")
    return session.rebuild(state, args.teacher, dict.fromkeys(("depth", "width", "num_classes", "form", "rank_scale")), build)


def check_teacher(args: argparse.Namespace, teacher: Any, architecture: Mapping[str, Any]) -> None:
    """Raise ValueError where student and teacher do not tell the same classes apart."""
    if teacher.fc.out_features != architecture["num_classes"]:
        raise ValueError(
            f"the teacher {args.teacher} tells {teacher.fc.out_features} classes apart, and {args.data} has "
            f"{architecture['num_classes']}"
        )


def distillation(args: argparse.Namespace, teacher: nn.Module) -> Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]:
    """The loss of a student: labels, the teacher's answers, and its attention after each stage."""
    teacher.eval().requires_grad_(False)

    def loss(student: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, activations = student(batch.images, activations=True)
        with torch.no_grad():
            answers, shown = teacher(batch.images, activations=True)
        strength = {"temperature": args.temperature, "alpha": args.alpha, "beta": args.beta}
        return distillation_loss(logits, activations, answers, shown, batch.labels, **strength), logits

    return loss


if __name__ == "__main__":
    main()
