"""Flags of the image programs, and the configuration that they resolve to; loads without torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.runs import ROOT, FlagParser, digest, natural, non_negative, positive_int

DATASETS: dict[str, tuple[int | None, int | None]] = {  # name: (classes, image size in pixels); None: as on disk
    "digits": (10, 8),
    "cifar10": (10, 32),
    "cifar100": (100, 32),
    "fashion_mnist": (10, 32),
    "tiny_imagenet": (None, 64),  # 200 classes, counted
    "imagefolder": (None, None),
}

# Flags that do not change what is computed, or that are paths; the rest is the configuration.
_NOT_CONFIGURATION = {
    "data_dir", "device", "workers", "save_dir", "save_every", "print_freq", "tensorboard", "row", "row_config", "resume",
    "evaluate", "dry_run", "dump_frobnorms", "measure", "densify", "seed", "half", "num_classes",
}  # fmt: skip


def add_flags(parser: FlagParser, *, epochs: int, datasets: Sequence[str]) -> None:
    """Add the flags that all image programs share: data, loop, device and run directory."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", "--dataset", choices=datasets, default="cifar10", help="data set; digits is embedded and needs no download"
    )
    data.add_argument(
        "--data-dir",
        type=Path,
        default=ROOT / "data",
        help="where data sets are, or are downloaded to; for imagefolder the folder with train/ and test/ or val/",
    )
    data.add_argument(
        "--image-size", type=positive_int, help="pixels; smaller images are padded with zeros, image folders resized"
    )
    data.add_argument("--num-classes", type=positive_int, help="classes of an image folder (default: counted in its train/)")
    data.add_argument("-j", "--workers", type=positive_int, default=4, metavar="N", help="threads that decode image folders")

    loop = parser.add_argument_group("training")
    loop.add_argument("--epochs", "--epoch", type=positive_int, default=epochs, metavar="N")
    loop.add_argument("--max-steps", type=positive_int, metavar="N", help="stop after N optimizer steps in all")
    loop.add_argument("-b", "--batch-size", type=positive_int, default=128, metavar="N", help="over all processes together")
    loop.add_argument("--lr", "--learning-rate", type=non_negative, default=0.1, help="initial learning rate")
    loop.add_argument("--momentum", type=non_negative, default=0.9)
    loop.add_argument("--weight-decay", "--wd", type=non_negative, default=1e-4, help="also the strength of --wd2fd")
    loop.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision")
    loop.add_argument("--half", action="store_true", help="the same as --amp fp16")
    loop.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    loop.add_argument("--seed", type=natural, default=0)

    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, or the number of a GPU")
    run.add_argument(
        "--save-dir",
        "--log-dir",
        type=Path,
        help="directory of the run (default: results/<program>/<row or run>/<configuration>)",
    )
    run.add_argument("--save-every", type=positive_int, default=1, metavar="N", help="epochs between checkpoints")
    run.add_argument(
        "--resume", metavar="PATH", help="go on from a checkpoint; 'auto': the newest good one of the save-dir, if any"
    )
    run.add_argument("-e", "--evaluate", action="store_true", help="only evaluate the checkpoint that --resume names")
    run.add_argument("--dry-run", action="store_true", help="build the model, print it as JSON and stop; needs no data")
    run.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events to the save-dir")
    run.add_argument("-p", "--print-freq", type=positive_int, default=50, metavar="N", help="steps between progress updates")
    run.add_argument("--row", help="name of the table row this run is for")
    run.add_argument("--row-config", help="hash of the configuration that row has")


def add_factorization_flags(parser: FlagParser, what: str) -> argparse._ArgumentGroup:
    """Add the flags of factorized training; ``what`` says which layers they factorize. Returns the group, for more."""
    method = parser.add_argument_group(f"factorization ({what})")
    method.add_argument(
        "--rank-scale", type=non_negative, default=0.0, help="rank as a share of out_channels * kernel; 0 is dense"
    )
    method.add_argument("--target-ratio", type=non_negative, default=0.0, help="instead of --rank-scale: parameters to keep")
    method.add_argument("--spectral", action="store_true", help="spectral initialization, short for --init spectral")
    method.add_argument("--init", choices=("regular", "spectral", "norm-matched"), help="initialization (default: regular)")
    method.add_argument("--wd2fd", action="store_true", help="Frobenius decay on the factors in place of their weight decay")
    method.add_argument("--pretrained", type=Path, metavar="FILE", help="dense checkpoint to load before factorizing")
    method.add_argument(
        "--densify", action="store_true", help="also fold the trained factors, and evaluate and write that model"
    )
    return method


def resolve(parser: FlagParser, args: argparse.Namespace) -> None:
    """Complete the shared flags in place; ends in one line on stderr where they contradict each other."""
    if args.half:
        if args.amp == "bf16":
            parser.error("--half is fp16: it and --amp bf16 exclude each other")
        args.amp = "fp16"
    if not 0 <= args.momentum < 1:
        parser.error(f"--momentum must be in [0, 1), got {args.momentum}")
    classes, size = DATASETS[args.data]
    if classes is not None and args.num_classes not in (None, classes):
        parser.error(f"--num-classes is for imagefolder: {args.data} has {classes}, got {args.num_classes}")
    args.num_classes = classes or args.num_classes
    if size is not None and args.image_size is not None and args.image_size < size:
        parser.error(f"--image-size must be at least {size} for {args.data}, got {args.image_size}")
    args.image_size = args.image_size or size
    if args.evaluate and not args.resume:
        parser.error("--evaluate needs --resume PATH: the checkpoint to evaluate")
    if args.dry_run and args.data == "tiny_imagenet":
        args.num_classes = args.num_classes or 200
    if args.dry_run and args.num_classes is None:
        parser.error("--dry-run with --data imagefolder needs --num-classes")


def resolve_factorization(parser: FlagParser, args: argparse.Namespace, needing: Sequence[str]) -> None:
    """Check --rank-scale, --target-ratio, --spectral and --init, and merge the last two into ``args.init``.

    ``needing`` names the flags that make no sense where nothing is factorized.
    """
    if args.rank_scale and args.target_ratio:
        parser.error(f"--rank-scale {args.rank_scale} and --target-ratio {args.target_ratio} exclude each other: give one")
    if max(args.rank_scale, args.target_ratio) > 100:
        parser.error(f"--rank-scale and --target-ratio are at most 100, got {max(args.rank_scale, args.target_ratio):g}")
    if args.spectral and args.init not in (None, "spectral"):
        parser.error(f"--spectral and --init {args.init} exclude each other: give one")
    if not (args.rank_scale or args.target_ratio):
        for name in needing:
            if getattr(args, name):
                flag = "--" + name.replace("_", "-")
                parser.error(f"{flag} needs factorized layers: give --rank-scale or --target-ratio above 0")
    args.init = "spectral" if args.spectral else args.init or "regular"
    del args.spectral


def inputs(args: argparse.Namespace) -> dict[str, str]:
    """Digests of the files and folders that flags name and that a run learns from."""
    paths = {name: getattr(args, name, None) for name in ("pretrained", "normalize", "teacher")}
    if args.data == "imagefolder":
        paths |= {split: args.data_dir / split for split in ("train", "test", "val")}
    return {name: digest(path) for name, path in paths.items() if path is not None and path.exists()}


def configuration(program: str, args: argparse.Namespace) -> dict[str, Any]:
    """The resolved configuration: everything that changes the result, without seed, device, workers and paths.

    A flag that names a file is recorded as whether it was given; :func:`inputs` tells what is in it.
    """
    config = {key: value for key, value in vars(args).items() if key not in _NOT_CONFIGURATION}
    return {"program": program} | {
        k: v is not None if k in ("pretrained", "normalize", "teacher") else v for k, v in sorted(config.items())
    }
