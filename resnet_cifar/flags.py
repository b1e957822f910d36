"""Flags of the ResNet experiments; loads without torch, so that scripts are emitted and errors shown at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.runs import FlagParser
from common.vision import flags

PROGRAM = "resnet_cifar"
DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110, 1202)}


def make_parser() -> FlagParser:
    parser = FlagParser(prog=f"{PROGRAM}/train.py", description="Train a ResNet on small images, dense or factorized.")
    parser.add_argument("-a", "--arch", choices=DEPTHS, default="resnet32")
    flags.add_flags(parser, epochs=200, datasets=("digits", "cifar10", "cifar100", "fashion_mnist", "imagefolder"))
    method = parser.add_argument_group("factorization (both convolutions of every block)")
    method.add_argument(
        "--rank-scale", type=flags.non_negative, default=0.0, help="rank as a share of out_channels * 3; 0 is dense"
    )
    method.add_argument(
        "--target-ratio", type=flags.non_negative, default=0.0, help="instead of --rank-scale: parameters to keep"
    )
    method.add_argument("--spectral", action="store_true", help="spectral initialization, short for --init spectral")
    method.add_argument("--init", choices=("regular", "spectral", "norm-matched"), help="initialization (default: regular)")
    method.add_argument("--wd2fd", action="store_true", help="Frobenius decay on the factors in place of their weight decay")
    method.add_argument("--no-frob", action="store_true", help="no decay at all on the factors")
    method.add_argument("--square", action="store_true", help="three factors U M V^T (deep) instead of two")
    method.add_argument("--residual", type=flags.non_negative, default=0.0, metavar="STD", help="noise added to the initial M")
    method.add_argument("--pretrained", type=Path, metavar="FILE", help="dense checkpoint to load before factorizing")
    method.add_argument(
        "--dump-frobnorms", action="store_true", help="write each layer's norm after each step to frobnorms.tensor"
    )
    method.add_argument("--normalize", type=Path, metavar="FILE", help="after each step, give layers the norms in this file")
    method.add_argument(
        "--densify", action="store_true", help="also fold the trained factors, and evaluate and write that model"
    )
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
