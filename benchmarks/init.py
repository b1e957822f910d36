"""Spectral initialization and the search for a rank scale: python -m benchmarks.init [--repeats N].

Times ``factorize_`` with init="spectral" at the paper's ratios, as it is and with the whole SVD of every layer, in turns, and
``rank_scale_for_ratio``. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable
from functools import partial
from unittest import mock

from tabulate import tabulate
from torch import nn

from benchmarks.timing import interleaved, machine, ratio, spread
from common import LowRankConfig, factorize_, linalg, rank_scale_for_ratio
from common.runs import positive_int
from compression_baselines import models as compression
from resnet_cifar import models as resnets
from tensor_wrn import models as wrn

Filter = Callable[[nn.Module, str], bool]


def networks() -> dict[str, tuple[nn.Module, Filter, float]]:
    """Dense networks, which of their layers are factorized, and the share of the parameters that is kept."""
    return {
        "ResNet20, 23.7 %": (resnets.build("resnet20", 10), resnets.is_factorized, 0.237),
        "VGG19, 10 %": (compression.VGG(19, 10), compression.is_factorized, 0.1),
        "WRN28-10, 1.667 %": (wrn.WideResNet(28, 10, 10), wrn.is_factorized, 0.01667),
        "WRN28-10, 6.667 %": (wrn.WideResNet(28, 10, 10), wrn.is_factorized, 0.06667),
    }


def initialize(model: nn.Module, filter_fn: Filter, scale: float, whole: bool) -> None:
    without = mock.patch.object(linalg, "_leading_svd", return_value=None)
    with without if whole else contextlib.nullcontext():
        factorize_(copy.deepcopy(model), LowRankConfig(scale), filter_fn=filter_fn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive_int, default=3)
    args = parser.parse_args()
    print(f"{machine()}, {args.repeats} repeats\n")
    lines = []
    for name, (model, filter_fn, target) in networks().items():
        search = partial(rank_scale_for_ratio, model, target, filter_fn=filter_fn)
        scale = search()
        made = interleaved(
            {
                "leading": partial(initialize, model, filter_fn, scale, False),
                "whole": partial(initialize, model, filter_fn, scale, True),
            },
            args.repeats,
        )
        found = interleaved({"search": search}, 10 * args.repeats)["search"]
        times = [spread(made["whole"]), spread(made["leading"]), f"{ratio(made['whole'], made['leading']):.1f}"]
        lines.append([name, f"{scale:.5f}", *times, f"{statistics.median(found) * 1e3:.1f}"])
    header = ["network", "rank scale", "whole SVD, ms", "as it is, ms", "times faster", "rank search, ms"]
    print(tabulate(lines, header, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
