"""Training ResNet20 at rank scale 0.111 end to end, against the dense network and a plain reference.

    python -m benchmarks.step [--repeats N] [--no-compile]

End to end is data, step, Frobenius decay and metrics, at batch 128 of 32x32 images. All cases take turns in one process;
warming up, and with it compilation, is timed apart. Prints a Markdown table of images a second, of ratios, and of the
epochs until compiling pays.
"""

from __future__ import annotations

import argparse
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any, cast

import torch
from tabulate import tabulate

from benchmarks import reference
from benchmarks.timing import interleaved, machine, ratio
from common import FrobeniusDecay, LowRankConfig, factorize_, param_groups
from common.distributed import Processes
from common.runs import Run, positive_int
from common.vision.data import Data
from common.vision.training import Trainer
from resnet_cifar.models import build, is_factorized

SCALE, BATCH, STEPS, EPOCH = 0.111, 128, 4, 50_000  # steps a turn, images an epoch


def case(data: Data, rank_scale: float, *, compiled: bool = False, amp: str = "off") -> Callable[[], None]:
    """Training as resnet_cifar/train.py does it, some steps a call."""
    torch.manual_seed(0)
    model = build("resnet20", 10)
    decay = None
    if rank_scale:
        factorize_(model, LowRankConfig(rank_scale, init="spectral"), filter_fn=is_factorized)
        decay = FrobeniusDecay(model, 1e-4)
    groups = param_groups(model, weight_decay=1e-4, decay=decay)
    args = Namespace(batch_size=BATCH, epochs=1, max_steps=None, compile=compiled, amp=amp)
    trainer = Trainer(
        model,
        data,
        cast(Run, None),  # nothing is written
        args,
        Processes(torch.device("cpu")),
        architecture={},
        optimizer=torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        schedule=lambda epoch: 0.1,
        decay=decay,
    )
    model.train()
    epoch = 0

    def train() -> None:
        nonlocal epoch
        epoch += 1
        for step in range(STEPS):
            trainer.totals += trainer._train_step(data.train_batch(0, epoch, step, BATCH), step)
        trainer.totals.tolist()

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive_int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile compiles")
    parser.add_argument("--workers", type=int, default=2, help="processes of the reference's DataLoader")
    args = parser.parse_args()
    pixels, labels = torch.randint(0, 256, (10 * BATCH * STEPS, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (5120,))
    data = Data((pixels, labels), (pixels[:10], labels[:10]), 10)
    plain = build("resnet20", 10)
    layers = reference.factorize(plain, is_factorized, SCALE)
    images = reference.Transformed(pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist())
    calls: dict[str, Any] = {
        "plain reference": reference.training(plain, layers, images, args.workers, STEPS),
        "dense": case(data, 0.0),
        "factorized": case(data, SCALE),
    }
    if not args.no_compile:
        calls["dense, compiled"] = case(data, 0.0, compiled=True)
        calls["factorized, compiled"] = case(data, SCALE, compiled=True)
        calls["dense, compiled, bf16"] = case(data, 0.0, compiled=True, amp="bf16")
        calls["factorized, compiled, bf16"] = case(data, SCALE, compiled=True, amp="bf16")
    warming = {}
    for name, call in calls.items():
        started = time.perf_counter()
        call()
        warming[name] = time.perf_counter() - started
    seconds = interleaved(calls, args.repeats)
    lines = []
    for name, found in seconds.items():
        median = statistics.median(found)
        against_dense = ratio(seconds[name.replace("factorized", "dense")], found) if "factorized" in name else None
        saved = EPOCH / (BATCH * STEPS) * (statistics.median(seconds[name.partition(",")[0]]) - median)  # seconds an epoch
        pays = f"{(warming[name] - median) / saved:.1f}" if "compiled" in name and saved > 0 else ""
        cells = [f"{BATCH * STEPS / median:,.0f}", f"{ratio(seconds['plain reference'], found):.2f}"]
        lines.append([name, *cells, f"{against_dense:.2f}" if against_dense else "", pays])
    header = ["training", "images / s", "times the reference", "times dense, the same way", "epochs until compiling pays"]
    print(f"{machine()}, {args.repeats} repeats of {STEPS} steps\n")
    print(tabulate(lines, header, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
