"""Flags of the ResNet experiments; loads without torch, so that scripts are emitted and errors shown at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from common.runs import FlagParser, non_negative
from common.vision import flags

PROGRAM = "resnet_cifar"
DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110, 1202)}


@cache
def make_parser() -> FlagParser:
    parser = FlagParser(prog=f"{PROGRAM}/train.py", description="Train a ResNet on small images, dense or factorized.")
    parser.add_argument("-a", "--arch", choices=DEPTHS, default="resnet32")
    flags.add_flags(parser, epochs=200, datasets=("digits", "cifar10", "cifar100", "fashion_mnist", "imagefolder"))
    method = flags.add_factorization_flags(parser, "both convolutions of every block")
    method.add_argument("--no-frob", action="store_true", help="no decay at all on the factors")
    method.add_argument("--square", action="store_true", help="three factors U M V^T (deep) instead of two")
    method.add_argument("--residual", type=non_negative, default=0.0, metavar="STD", help="noise added to the initial M")
    method.add_argument(
        "--dump-frobnorms", action="store_true", help="write each layer's norm after each step to frobnorms.tensor"
    )
    method.add_argument("--normalize", type=Path, metavar="FILE", help="after each step, give layers the norms in this file")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed, completed and checked flags; ends in one line on stderr and exit status 2 where they are wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    flags.resolve(parser, args)
    needing = ("spectral", "init", "wd2fd", "no_frob", "square", "dump_frobnorms", "normalize", "densify")
    flags.resolve_factorization(parser, args, needing)
    if args.dump_frobnorms and args.normalize:
        parser.error("--dump-frobnorms and --normalize exclude each other: the norms of a replay are those of its file")
    if args.residual and not args.square:
        parser.error(f"--residual {args.residual} is noise on M, the middle one of three factors: give --square too")
    return args
