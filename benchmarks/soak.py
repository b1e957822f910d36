"""Check that memory does not grow over many runs in one process: python -m benchmarks.soak [--minutes N].

Repeatedly trains, stops, resumes and evaluates small networks on the embedded digits (low-rank, sparse, tensors), with
checkpoints after every epoch. Prints the resident memory after each round. Growth is measured from the end of the first tenth
of the time, when all programs have run and the allocator holds what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from benchmarks.timing import machine, resident
from common.experiments.config import positive_int
from compression_baselines import sparse
from compression_baselines import train as compression
from resnet_cifar import train as resnet
from tensor_wrn import train as tensors

DIGITS = "--data digits --device cpu --epochs 2 --resume auto"
SMALL = f"--network resnet --depth 8 --width 32 --image-size 8 {DIGITS}"
RUNS: list[tuple[Callable[[list[str]], None], str]] = [
    (resnet.main, f"--arch resnet20 --rank-scale 0.111 --spectral --wd2fd --dump-frobnorms {DIGITS}"),
    (compression.main, f"{SMALL} --target-ratio 0.5 --spectral --wd2fd"),
    (sparse.main, f"{SMALL} --method rigl --target-ratio 0.3"),
    (tensors.main, f"digits teacher --conv TensorTrain_0.5 --wrn-depth 10 --wrn-width 1 --wd2fd {DIGITS}"),
]


def round_of_runs(folder: Path, seed: int) -> None:
    """Train each program for a third of its steps, resume it to the end, and evaluate the ResNet's checkpoint."""
    for number, (main, flags) in enumerate(RUNS):
        run = folder / str(number)
        words = [*flags.split(), "--seed", str(seed), "--save-dir", str(run)]
        main([*words, "--max-steps", "8"])
        main(words)
        if main is resnet.main:
            checkpoint = str(run / "checkpoint.pt")
            main([*"--data digits --device cpu --arch resnet20 --evaluate --resume".split(), checkpoint])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=positive_int, default=30)
    args = parser.parse_args()
    started, rounds, found = time.monotonic(), 0, []
    with tqdm(total=args.minutes, unit="minute", disable=None) as progress:
        while (minutes := (time.monotonic() - started) / 60) < args.minutes:
            said = io.StringIO()
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                round_of_runs(Path(folder), rounds)
            rounds += 1
            found.append((minutes, resident("VmRSS")))
            tqdm.write(f"{minutes:5.1f} minutes: {found[-1][1]:.0f} MiB", file=sys.stderr)
            progress.update(round(minutes - progress.n, 1))
    first = next((memory for minutes, memory in found if minutes >= args.minutes / 10), found[-1][1])
    most, last = max(memory for _, memory in found), found[-1][1]
    print(f"{machine()}: {rounds} rounds of {len(RUNS)} programs in {args.minutes} minutes")
    print(f"resident memory: {first:.0f} MiB after a tenth of the time, {most:.0f} at most, {last:.0f} in the end")
    print(f"growth: {last / first - 1:+.2%}")


if __name__ == "__main__":
    main()
