"""Time tensor convolutions as part of a training step: python -m benchmarks.tensors [--form Tucker --rank-scale 0.68].

Builds WideResNet28-10 with all decompositions and spectral initialization. Then it times whole training steps at batch 128 of
32x32 images, and in turns with them the reconstruction of all tensors with its gradient, and the Frobenius decay of all
tensors. Prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common import FrobeniusDecay, param_groups
from common.experiments.config import positive_int
from tensor_wrn.config import FORMS
from tensor_wrn.factorize import make_tensors
from tensor_wrn.layers import TensorPointwise


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS[1:], default="TensorTrain")
    parser.add_argument("--rank-scale", type=float, default=0.705)
    parser.add_argument("--batch-size", type=positive_int, default=128)
    parser.add_argument("--repeats", type=positive_int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    architecture = {"depth": 28, "width": 10, "num_classes": 10, "form": args.form, "rank_scale": args.rank_scale}
    model, report = make_tensors(architecture, "spectral")
    print(f"building {args.form}_{args.rank_scale:g}, {report.to_dict()['parameters']['compressed']:,} parameters: ", end="")
    print(f"{time.perf_counter() - started:.1f} s on {torch.get_num_threads()} threads")

    tensors = [module for module in model.modules() if isinstance(module, TensorPointwise)]
    decay = FrobeniusDecay(model, 5e-4)
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=5e-4, decay=decay), lr=0.01, momentum=0.9)
    images = torch.randn(args.batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (args.batch_size,))
    upstream = [torch.randn(tensor.out_channels, tensor.in_channels, 1, 1) for tensor in tensors]

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        decay.step()
        optimizer.step()

    def reconstruct() -> None:
        torch.autograd.backward([tensor.to_dense() for tensor in tensors], upstream)

    actions = {"training step": step, "reconstruction": reconstruct, "decay": decay.step}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(args.repeats + 1):  # the first warms up
        for name, action in actions.items():
            taken = timed(action)
            if repeat:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {median * 1e3:.0f} ms, {median / medians['training step']:.1%} of a step")


if __name__ == "__main__":
    main()
