"""The recipe that the compression programs share: how images are normalized, and the schedule of the learning rate."""

from __future__ import annotations

import argparse

from common.vision.data import CIFAR10, CIFAR100, Statistics

_TINY_IMAGENET: Statistics = ((0.48024579, 0.44807218, 0.39754775), (0.27698641, 0.26906449, 0.28208191))


def statistics(data: str) -> Statistics:
    """Mean and standard deviation by which a data set is normalized; digits and image folders as CIFAR-10."""
    return {"cifar100": CIFAR100, "tiny_imagenet": _TINY_IMAGENET}.get(data, CIFAR10)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """A tenth at one half and again at three quarters of ``args.epochs``; in every round of them anew."""
    return args.lr * 0.1 ** sum(epoch % args.epochs >= share * args.epochs for share in (0.5, 0.75))


def check_image_size(args: argparse.Namespace, size: int) -> None:
    """Raise ValueError where images are too small for the network."""
    if args.network == "vgg" and size < 32:
        raise ValueError(f"vgg halves its images five times and needs 32 pixels, got {size}: give --image-size 32")
