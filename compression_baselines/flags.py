"""Flags of the compression programs train.py, prune.py and sparse.py; loads without torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from common.runs import FlagParser, natural, non_negative, positive_int
from common.vision import flags

PROGRAM = "compression_baselines"
DATASETS = ("cifar10", "cifar100", "tiny_imagenet", "digits", "imagefolder")
VGG_DEPTHS = (11, 13, 16, 19)

PRUNERS = ("c-obd", "c-obs", "kron-obd", "kron-obs", "eigendamage", "eigendamage-separable")
SPARSE = ("magnitude", "lottery", "snip", "grasp", "synflow", "set", "deepr", "dsr", "rigl")

# What a sparse method does where no flag tells otherwise. update_every None: every epoch. Flags that a method lacks it refuses.
SPARSE_DEFAULTS: dict[str, dict[str, object]] = {
    "magnitude": {"distribution": "uniform", "update_every": 100, "update_until": 0.75},
    "lottery": {"distribution": "global", "rounds": 5, "rewind": None},
    "snip": {"score_batches": None},
    "grasp": {"score_batches": None},
    "synflow": {},
    "set": {"distribution": "erk", "update_every": None, "update_until": 1.0, "drop_fraction": 0.3},
    "deepr": {"distribution": "uniform", "l1": 1e-5, "temperature": 1e-10},
    "dsr": {"distribution": "uniform", "update_every": None, "update_until": 0.75, "drop_fraction": 0.1},
    "rigl": {"distribution": "erk", "update_every": 100, "update_until": 0.75, "drop_fraction": 0.3},
}
_SPARSE_FLAGS = sorted({name for defaults in SPARSE_DEFAULTS.values() for name in defaults})


def _parser(script: str, description: str, *, epochs: int) -> FlagParser:
    """A parser with the flags that all three programs share."""
    parser = FlagParser(prog=f"{PROGRAM}/{script}", description=description)
    parser.add_argument("--network", choices=("resnet", "vgg"), default="vgg")
    parser.add_argument("--depth", type=int, help="6n + 2 for resnet (default: 32); 11, 13, 16 or 19 for vgg (default: 19)")
    parser.add_argument("--width", type=int, choices=(64, 32), help="channels of ResNet's first stage (default: 64)")
    flags.add_flags(parser, epochs=epochs, datasets=DATASETS)
    parser.set_defaults(weight_decay=None)
    parser.add_argument("--auto-resume", dest="resume", action="store_const", const="auto", help="short for --resume auto")
    parser.add_argument("--kaiming", action="store_true", help="VGG: Kaiming initialization of classifier and of each factor")
    parser.add_argument(
        "--measure", action="store_true", help="also measure size, multiply-adds, latency and memory (measure.json)"
    )
    return parser


def _resolve(parser: FlagParser, args: argparse.Namespace) -> None:
    """Complete and check the flags that all three programs share."""
    if args.data == "digits" and args.image_size is None:
        args.image_size = 32  # VGG halves its images five times
    flags.resolve(parser, args)
    if args.network == "vgg":
        args.depth = 19 if args.depth is None else args.depth
        if args.depth not in VGG_DEPTHS:
            parser.error(f"--depth of vgg must be 11, 13, 16 or 19, got {args.depth}")
        if args.width is not None:
            parser.error(f"--width is for resnet, got {args.width} with vgg")
    else:
        args.depth, args.width = 32 if args.depth is None else args.depth, args.width or 64
        if args.depth < 8 or args.depth % 6 != 2:
            parser.error(f"--depth of resnet must be 6n + 2 and at least 8, got {args.depth}")
        if args.kaiming:
            parser.error("--kaiming is for vgg: resnet is always initialized so")
    if args.weight_decay is None:
        args.weight_decay = 1e-4 if args.network == "resnet" else 2e-4


@cache
def make_parser() -> FlagParser:
    parser = _parser("train.py", "Train ResNet32 or VGG19 at a budget of parameters.", epochs=200)
    flags.add_factorization_flags(parser, "every convolution but the first")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed, completed and checked flags of train.py; ends in one line on stderr and exit status 2 where they are wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    _resolve(parser, args)
    flags.resolve_factorization(parser, args, ("spectral", "init", "wd2fd", "densify"))
    return args


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


@cache
def make_prune_parser() -> FlagParser:
    parser = _parser("prune.py", "Prune the channels of a trained network, then fine-tune it.", epochs=150)
    parser.set_defaults(lr=1e-3)  # as EigenDamage fine-tunes
    method = parser.add_argument_group("pruning")
    method.add_argument("--method", choices=PRUNERS, required=True)
    method.add_argument("--pretrained", type=Path, metavar="FILE", help="checkpoint of the trained dense network")
    method.add_argument("--target-ratio", type=_share, help="parameters to keep, as a share of the dense network's")
    method.add_argument("--ratio", type=_share, help="instead of --target-ratio: channels (or eigendirections) to remove")
    method.add_argument("--prune-ratio-limit", type=_share, default=0.95, help="at most this share of a layer's is removed")
    method.add_argument("--rounds", type=positive_int, default=1, help="iterative pruning: rounds, each of --epochs")
    method.add_argument(
        "--fisher", choices=("true", "empirical"), default="true", help="labels sampled from the network, or given"
    )
    method.add_argument("--fisher-samples", type=positive_int, metavar="N", help="images (default: the training split)")
    method.add_argument("--fix-rotation", action="store_true", help="eigendamage: do not train the rotations")
    return parser


def parse_prune(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed, completed and checked flags of prune.py; ends like :func:`parse` where they are wrong."""
    parser = make_prune_parser()
    args = parser.parse_args(argv)
    _resolve(parser, args)
    if (args.ratio is None) == (args.target_ratio is None) and not args.evaluate:
        parser.error("give --target-ratio (parameters to keep) or --ratio (channels to remove), one of them")
    if args.pretrained is None and not args.evaluate:
        parser.error("--pretrained is missing: the checkpoint.pt of a dense run of train.py")
    for name in ("ratio", "prune_ratio_limit"):
        if getattr(args, name) == 1:
            parser.error(f"--{name.replace('_', '-')} must be below 1: at 1 nothing would be left")
    if args.rounds > 1 and args.method == "eigendamage-separable":
        parser.error("--rounds above 1 is not for eigendamage-separable: its depthwise middle has no eigenbasis to go on in")
    if args.fix_rotation and not args.method.startswith("eigendamage"):
        parser.error(f"--fix-rotation is for eigendamage: {args.method} has no rotations")
    return args


@cache
def make_sparse_parser() -> FlagParser:
    parser = _parser("sparse.py", "Train a network with a given number of non-zero weights.", epochs=200)
    method = parser.add_argument_group("sparsity (defaults depend on the method)")
    method.add_argument("--method", choices=SPARSE, required=True)
    method.add_argument("--target-ratio", type=_share, help="non-zeros to keep, as a share of all parameters")
    method.add_argument("--distribution", choices=("uniform", "erk", "global"), help="how non-zeros spread over layers")
    method.add_argument("--update-every", type=positive_int, metavar="N", help="steps between changes of the masks")
    method.add_argument("--update-until", type=_share, help="share of the training after which masks stay")
    method.add_argument("--drop-fraction", type=_share, help="share of the non-zeros that a change replaces")
    method.add_argument("--rounds", type=positive_int, help="lottery: trainings, each of --epochs")
    method.add_argument("--rewind", type=natural, metavar="EPOCH", help="lottery: epoch whose weights are gone back to")
    method.add_argument("--score-batches", type=positive_int, metavar="N", help="snip, grasp: batches (default: 10 a class)")
    method.add_argument("--l1", type=non_negative, help="deepr: strength of the decay towards zero")
    method.add_argument("--temperature", type=non_negative, help="deepr: strength of the random walk")
    return parser


def parse_sparse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed, completed and checked flags of sparse.py; ends like :func:`parse` where they are wrong."""
    parser = make_sparse_parser()
    args = parser.parse_args(argv)
    _resolve(parser, args)
    if args.target_ratio is None and not args.evaluate:
        parser.error("--target-ratio is missing: the share of all parameters to keep")
    defaults = SPARSE_DEFAULTS[args.method]
    for name in _SPARSE_FLAGS:
        if name not in defaults and getattr(args, name) is not None:
            users = ", ".join(method for method in SPARSE if name in SPARSE_DEFAULTS[method])
            parser.error(f"--{name.replace('_', '-')} is for {users}: {args.method} does not use it")
        if getattr(args, name) is None:
            setattr(args, name, defaults.get(name))
    if args.distribution == "global" and args.method not in ("magnitude", "lottery"):
        parser.error(f"--distribution global is for magnitude and lottery: {args.method} takes uniform or erk")
    if args.method == "lottery":
        if args.rewind is None:
            args.rewind = min(1, args.epochs - 1)
        if args.rewind >= args.epochs:
            parser.error(f"--rewind must be below --epochs {args.epochs}: an epoch of the first round, got {args.rewind}")
        if args.rounds < 2:
            parser.error("--rounds must be at least 2 for lottery: it prunes between rounds, got 1")
    if args.compile:
        parser.error("--compile does not see the masks change: sparse.py runs without it")
    return args
