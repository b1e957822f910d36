"""Time spectral initialization and the search for a rank scale: python -m benchmarks.init [--repeats N] [--markdown].

Times ``factorize_`` with init="spectral" at the paper's ratios, as implemented and with the full SVD of every layer, in turns,
and ``rank_scale_for_ratio``. The arithmetic of a full SVD is 6 m n^2 + 20 n^3 for a layer with m >= n (Golub & Van Loan, for U,
S and V). For large matrices the implementation needs 2 m n^2 for the Gram matrix, 4/3 n^3 + 2 n^2 r to reduce it and transform
back, and 2 m n r for the other factor.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from functools import partial
from unittest import mock

from torch import nn

from benchmarks.networks import NETWORKS, Filter
from benchmarks.timing import arguments, interleaved, ratio, show, spread
from common import LowRankConfig, factorize_, linalg, rank_scale_for_ratio
from common.layers import FactorizedMatrix

NAMES = ["ResNet20, rank scale 0.111", "VGG19, 10 %", "WRN28-10, 1.667 %", "WRN28-10, 6.667 %"]


def initialize(model: nn.Module, filter_fn: Filter, scale: float, whole: bool) -> nn.Module:
    without = mock.patch.object(linalg, "_leading_svd", return_value=None)
    model = copy.deepcopy(model)
    with without if whole else contextlib.nullcontext():
        factorize_(model, LowRankConfig(scale), filter_fn=filter_fn, skip_growing=False)
    return model


def arithmetic(model: nn.Module) -> tuple[float, float]:
    """GFLOP of the full SVDs of the factorized layers, and of their leading singular triples."""
    whole = leading = 0.0
    for layer in model.modules():
        if isinstance(layer, FactorizedMatrix):
            n, m = sorted((layer.u.shape[0], layer.vt.shape[1]))
            svd = 6 * m * n**2 + 20 * n**3
            small = n < 256 or 2 * layer.rank > n  # the condition of _leading_svd
            whole += svd
            leading += svd if small else 2 * m * n**2 + 4 / 3 * n**3 + 2 * n**2 * layer.rank + 2 * m * n * layer.rank
    return whole / 1e9, leading / 1e9


def main() -> None:
    args = arguments(__doc__, repeats=3).parse_args()
    lines = []
    for name in NAMES:
        network = NETWORKS[name]
        model, filter_fn = network.dense(), network.is_factorized
        scale = network.rank_scale(model)
        make = partial(initialize, model, filter_fn, scale)
        made = interleaved({"leading": partial(make, False), "whole": partial(make, True)}, args.repeats)
        search = partial(rank_scale_for_ratio, model, network.ratio or 0.237, filter_fn=filter_fn)
        found = interleaved({"search": search}, 10 * args.repeats)["search"]
        times = [spread(made["whole"]), spread(made["leading"]), f"{ratio(made['whole'], made['leading']):.1f}"]
        flops = [f"{count:,.1f}" for count in arithmetic(make(False))]
        lines.append([name, f"{scale:.5f}", *times, *flops, f"{statistics.median(found) * 1e3:.1f}"])
    header = ["network", "rank scale", "whole SVD, ms", "as it is, ms", "times faster", "GFLOP, whole", "as it is",
              "rank search, ms"]  # fmt: skip
    show(args, "Spectral initialization and rank search", header, lines)


if __name__ == "__main__":
    main()
