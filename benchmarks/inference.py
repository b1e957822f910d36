"""Time inference at batch 1 and 128: python -m benchmarks.inference [--repeats N] [--markdown] [--figure FILE].

ResNet32 [64, 128, 256] on 32x32 images: dense, factorized at rank scales from 0.05 to 1, and folded (``densify_``) from a tenth
of the parameters. They take turns in one process. Also prints the rank scale below which the factorized network is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.networks import NETWORKS
from benchmarks.timing import arguments, interleaved, ratio, show, spread
from common import LowRankConfig, densify_, factorize_
from common.experiments import distributed

SCALES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
NETWORK = NETWORKS["ResNet32 [64, 128, 256], 10 %"]


def answering(model: nn.Module, images: Tensor, times: int) -> Callable[[], None]:
    model = model.eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def answer() -> None:
        for _ in range(times):
            model(images)

    return answer


def crossover(scales: list[float], speedups: list[float]) -> str:
    """The rank scale at which the ratio falls to 1, by linear interpolation between neighbors."""
    for (low, fast), (high, slow) in zip(zip(scales, speedups), zip(scales[1:], speedups[1:])):  # noqa: B905
        if fast >= 1 > slow:
            return f"{low + (high - low) * (fast - 1) / (fast - slow):.2f}"
    return f"above {scales[-1]:g}" if speedups[-1] >= 1 else f"below {scales[0]:g}"


def plot(path: Path, found: dict[int, list[float]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (batch, speedups), marker in zip(found.items(), "os", strict=True):
        axes.plot(SCALES, speedups, marker=marker, label=f"batch {batch}")
    axes.axhline(1, color="0.5", linewidth=1)
    axes.annotate("dense", (SCALES[-1], 1), xytext=(0, 3), textcoords="offset points", ha="right", color="0.4")
    axes.set(xlabel="rank scale", ylabel="times faster than dense", ylim=(0, None), title="ResNet32 [64, 128, 256], inference")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = arguments(__doc__, repeats=15)
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw the ratios, to FILE.svg")
    args = parser.parse_args()
    distributed.start("cpu")
    torch.manual_seed(0)
    models = {"dense": NETWORK.dense()}
    for scale in SCALES:
        model = NETWORK.dense()
        factorize_(model, LowRankConfig(scale), filter_fn=NETWORK.is_factorized, skip_growing=False)
        models[f"{scale:g}"] = model
    folded = NETWORK.factorized()
    densify_(folded)
    models["folded"] = folded
    lines, found = [], {}
    for batch, times in ((1, 5), (128, 1)):
        images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
        seconds = interleaved({name: answering(model, images, times) for name, model in models.items()}, args.repeats)
        for name in models:
            faster = ratio(seconds["dense"], seconds[name])
            label = name if name in ("dense", "folded") else f"rank scale {name}"
            lines.append([batch, label, spread([each / times for each in seconds[name]]), f"{faster:.2f}"])
        found[batch] = [ratio(seconds["dense"], seconds[f"{scale:g}"]) for scale in SCALES]
    show(args, "Inference, ResNet32 [64, 128, 256]", ["batch", "model", "ms", "times faster than dense"], lines)
    ends = "; ".join(f"batch {batch}: {crossover(list(SCALES), speedups)}" for batch, speedups in found.items())
    print(f"Faster than dense below the rank scale of: {ends}.\n")
    if args.figure:
        plot(args.figure, found)


if __name__ == "__main__":
    main()
