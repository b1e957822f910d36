"""Compare the accuracy of the fast paths: python -m benchmarks.accuracy DATA_DIR [--epochs N] [--repeats N] [--markdown].

Trains ResNet20 at rank scale 0.111 with both schemes on the images of DATA_DIR (train/ and test/, one folder per class): in
eager float32, and with the flags that make it faster, on the same --repeats seeds. Prints the final test accuracies and the
mean of the per-seed differences. Finished runs are kept in results/accuracy and are not repeated.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

from benchmarks.timing import arguments, show
from common.experiments.files import ROOT, read_json

BASE = "--arch resnet20 --rank-scale 0.111 --spectral --wd2fd --device cpu --resume auto --data imagefolder"
WAYS = {
    "float32, eager": [],
    "--compile": ["--compile"],
    "--compile --amp bf16": ["--compile", "--amp", "bf16"],
}


def accuracy(data_dir: Path, way: str, epochs: int, seed: int) -> float:
    """Final test accuracy in percent of a run. The run is made if it does not exist yet."""
    name = way.replace("--", "").replace(", ", "-").replace(" ", "-")
    directory = ROOT / "results" / "accuracy" / f"{data_dir.name}-{epochs}" / name / f"seed{seed}"
    flags = [*BASE.split(), "--data-dir", str(data_dir), "--epochs", str(epochs), "--seed", str(seed)]
    flags += ["--save-dir", str(directory)]
    subprocess.run([sys.executable, ROOT / "resnet_cifar" / "train.py", *flags, *WAYS[way]], check=True, stdout=sys.stderr)
    return read_json(directory / "result.json")["metrics"]["final"]


def folder(text: str) -> Path:
    if not (Path(text) / "train").is_dir():
        raise ArgumentTypeError(f"{text} has no folder train/")
    return Path(text)


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("data_dir", type=folder, metavar="DATA_DIR")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(1, args.repeats + 1):
        for way, finals in found.items():
            finals.append(accuracy(args.data_dir, way, args.epochs, seed))
    base = next(iter(found.values()))
    lines = []
    for way, finals in found.items():
        differences = [one - other for one, other in zip(finals, base, strict=True)]
        deviation = f" ± {statistics.stdev(finals):.2f}" if args.repeats > 1 else ""
        each = ", ".join(f"{final:.2f}" for final in finals)
        lines.append(
            [way, args.repeats, each, f"{statistics.mean(finals):.2f}{deviation}", f"{statistics.mean(differences):+.2f}"]
        )
    header = ["ResNet20, rank scale 0.111", "n", "final test accuracy of each seed, %", "mean", "mean difference"]
    show(args, f"Accuracy after {args.epochs} epochs of {args.data_dir.name}", header, lines)


if __name__ == "__main__":
    main()
