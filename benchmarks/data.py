"""Time batches of 32x32 images that are cropped, flipped, normalized and ready on the device.

    python -m benchmarks.data [--repeats N] [--markdown]

The comparison is the released code's way: torchvision's transforms on PIL images, one by one, through a DataLoader without and
with two worker processes. Prints images per second over an epoch of 10,000 images in batches of 128.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader

from benchmarks.reference import Transformed
from benchmarks.timing import arguments, interleaved, ratio, show
from common.experiments import distributed
from common.vision.data import Data

IMAGES, BATCH = 10_000, 128


def main() -> None:
    args = arguments(__doc__, repeats=7).parse_args()
    distributed.start("cpu")
    pixels = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (IMAGES,))
    data = Data((pixels, labels), (pixels[:10], labels[:10]), 10)
    released = Transformed(pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist())
    epoch = 0

    def ours() -> None:
        nonlocal epoch
        epoch += 1  # each epoch draws new augmentation
        for step in range(data.steps_per_epoch(BATCH)):
            data.train_batch(0, epoch, step, BATCH)

    def loader(workers: int) -> Callable[[], None]:
        def through() -> None:
            for _ in DataLoader(released, BATCH, shuffle=True, num_workers=workers):
                pass

        return through

    calls = {"torchvision, one process": loader(0), "torchvision, two more processes": loader(2), "this project": ours}
    seconds = interleaved(calls, args.repeats)
    first = next(iter(seconds.values()))
    lines = [[n, f"{IMAGES / statistics.median(s):,.0f}", f"{ratio(first, s):.1f}"] for n, s in seconds.items()]
    show(args, f"Batches of {BATCH}, ready on the device", ["batches", "images / s", "times faster"], lines)


if __name__ == "__main__":
    main()
