"""Flags of the compression experiments; loads without torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common.runs import FlagParser
from common.vision import flags

PROGRAM = "compression_baselines"
DATASETS = ("cifar10", "cifar100", "tiny_imagenet", "digits", "imagefolder")
VGG_DEPTHS = (11, 13, 16, 19)


def make_parser() -> FlagParser:
    parser = FlagParser(prog=f"{PROGRAM}/train.py", description="Train ResNet32 or VGG19 at a budget of parameters.")
    parser.add_argument("--network", choices=("resnet", "vgg"), default="vgg")
    parser.add_argument("--depth", type=int, help="6n + 2 for resnet (default: 32); 11, 13, 16 or 19 for vgg (default: 19)")
    parser.add_argument("--width", type=int, choices=(64, 32), help="channels of ResNet's first stage (default: 64)")
    flags.add_flags(parser, epochs=200, datasets=DATASETS)
    parser.set_defaults(weight_decay=None)
    parser.add_argument("--auto-resume", dest="resume", action="store_const", const="auto", help="short for --resume auto")
    method = flags.add_factorization_flags(parser, "every convolution but the first")
    method.add_argument("--kaiming", action="store_true", help="VGG: Kaiming initialization of classifier and of each factor")
    parser.add_argument(
        "--measure", action="store_true", help="also measure size, multiply-adds, latency and memory (measure.json)"
    )
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed, completed and checked flags; ends in one line on stderr and exit status 2 where they are wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.data == "digits" and args.image_size is None:
        args.image_size = 32  # VGG halves its images five times
    flags.resolve(parser, args)
    flags.resolve_factorization(parser, args, ("spectral", "init", "wd2fd", "densify"))
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
    return args
