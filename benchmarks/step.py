"""Time training end to end, compared with a plain reference, the dense network and other libraries' layers.

    python -m benchmarks.step [--repeats N] [--no-compile] [--markdown]

End to end means data, step, Frobenius decay and metrics, at batch 128 of 32x32 images, as in the programs, except for the check
for numbers that are not finite every 50 steps. Every case runs in its own process, and the cases take turns. Two things favor
the reference: its loader processes continue for some batches during the other cases' turns, and their memory is not counted.

Prints images per second with ratios, the epochs until compiling has paid for itself (with an empty cache) and peak memory, for
ResNet20 at rank scale 0.111; then a step of larger networks; then the bounds of a step: the arithmetic of its convolutions at
the measured peak, and the memory that its operators read and write.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import reference
from benchmarks.networks import NETWORKS
from benchmarks.timing import Call, IsolatedCall, arguments, interleaved, ratio, show, spread
from common import FrobeniusDecay, param_groups
from common.experiments import distributed
from common.experiments.runs import Run
from common.vision.config import ImageRunConfig
from common.vision.data import Data
from common.vision.training import Trainer

BATCH, STEPS, EPOCH = 128, 16, 50_000  # images per step, steps per turn, images per epoch
RESNET20 = "ResNet20, rank scale 0.111"
LARGER = ["ResNet32 [64, 128, 256], 10 %", "VGG19, 10 %", "WRN16-4 Conv, 6.667 %", "WRN16-4 TensorTrain, 6.667 %"]


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randint(0, 256, (5120, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (5120,))


def ours(network: str, factorized: bool, *, compiled: bool = False, amp: str = "off", steps: int = STEPS) -> Call:
    """Training as in this project's programs, for ``steps`` steps per call."""
    processes = distributed.start("cpu")
    setattr(torch._inductor.config, "force_disable_caches", True)  # noqa: B010 (so that compiling takes as long as the first time)
    split = images()
    data = Data(split, (split[0][:10], split[1][:10]), 10)
    made = NETWORKS[network]
    model = made.factorized() if factorized else made.dense()
    decay = FrobeniusDecay(model, 1e-4) if factorized else None
    groups = param_groups(model, weight_decay=1e-4, decay=decay)
    trainer = Trainer(
        model,
        data,
        Run(Path("never written"), {}, 0),  # a trainer writes files only in fit()
        config=ImageRunConfig(batch_size=BATCH, epochs=1, compile=compiled, amp=amp),
        processes=processes,
        architecture={},
        optimizer=torch.optim.SGD(groups, lr=0.01, momentum=0.9),
        schedule=lambda epoch: 0.01,
        decay=decay,
    )
    model.train()
    epoch = 0

    def train() -> None:
        nonlocal epoch
        epoch += 1
        for step in range(steps):
            trainer.train_step(data.train_batch(0, epoch, step, BATCH))
        trainer.totals.tolist()

    return train


def plain(layer: str, workers: int) -> Call:
    """Training as in the released code, with its plain layer or another library's layer."""
    pixels, labels = images()
    model = NETWORKS[RESNET20].dense()
    layers = reference.factorize(model, NETWORKS[RESNET20].is_factorized, NETWORKS[RESNET20].scale, reference.LAYERS[layer])
    transformed = reference.Transformed(pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist())
    return reference.training(model, layers, transformed, workers, STEPS)


def end_to_end(args: Namespace) -> None:
    cases: dict[str, Callable[[], Call]] = {name: partial(plain, name, args.workers) for name in reference.available()}
    cases |= {"dense": partial(ours, RESNET20, False), "factorized": partial(ours, RESNET20, True)}
    ways: dict[str, dict[str, Any]] = {"bf16": {"amp": "bf16"}}
    if not args.no_compile:
        ways |= {"compiled": {"compiled": True}, "compiled, bf16": {"compiled": True, "amp": "bf16"}}
    if not distributed.has_bfloat16(torch.device("cpu")):
        ways = {way: flags for way, flags in ways.items() if "amp" not in flags}
    for way, flags in ways.items():
        cases |= {f"{kind}, {way}": partial(ours, RESNET20, kind == "factorized", **flags) for kind in ("dense", "factorized")}
    calls = {name: IsolatedCall(make) for name, make in cases.items()}
    seconds = interleaved(calls, args.repeats, rest=0.2)
    peak = {name: call.peak_memory() for name, call in calls.items()}
    lines = []
    for name, found in seconds.items():
        median = statistics.median(found)
        against_dense = f"{ratio(seconds[name.replace('factorized', 'dense')], found):.2f}" if "factorized" in name else ""
        pays = ""
        if "compiled" in name:
            eager = name.replace(", compiled", "")
            saved = EPOCH / (BATCH * STEPS) * (statistics.median(seconds[eager]) - median)
            pays = f"{(calls[name].warm_up - median) / saved:.1f}" if saved > 0 else "never"
        speed = [f"{BATCH * STEPS / median:,.0f}", spread([each / STEPS for each in found])]
        against = [f"{ratio(seconds[reference.PLAIN], found):.2f}", against_dense]
        lines.append([name, *speed, *against, pays, f"{peak[name]:,.0f}", f"{peak[name] / peak[reference.PLAIN]:.2f}"])
        calls[name].close()
    header = ["training", "images / s", "step, ms", "times the reference", "times dense, the same way",
              "epochs until compiling pays", "peak memory, MiB", "of the reference's"]  # fmt: skip
    show(args, f"{RESNET20}, batch {BATCH}, end to end", header, lines)


def larger(args: Namespace) -> None:
    lines = []
    for network in LARGER:
        kinds = {"dense": False, "factorized": True}
        calls = {kind: IsolatedCall(partial(ours, network, factorized, steps=1)) for kind, factorized in kinds.items()}
        seconds = interleaved(calls, args.repeats, rest=0.2)
        lines.append([network, *map(spread, seconds.values()), f"{ratio(seconds['dense'], seconds['factorized']):.2f}"])
        for call in calls.values():
            call.close()
    header = ["network", "dense step, ms", "factorized step, ms", "times faster"]
    show(args, f"A training step of larger networks, batch {BATCH}, eager", header, lines)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, each operand once: of convolutions, and of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"convolutions": 0, "all": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        outputs = result if isinstance(result, tuple | list) else [result]
        count = sum(each.numel() * each.element_size() for each in (*args, *outputs) if isinstance(each, Tensor))
        self.bytes["all"] += count
        self.bytes["convolutions"] += count * ("convolution" in str(func))
        return result


def limits(args: Namespace) -> None:
    """Times that the arithmetic and the memory traffic of a step allow."""
    rates = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for dtype in rates:
        x = torch.randn(1, 2048, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.randn(2048, 2048, 1, 1, dtype=dtype)
        with torch.no_grad():
            best = min(interleaved({"product": partial(F.conv2d, x, w)}, 10)["product"])
        rates[dtype] = 2 * 4096 * 2048**2 / best / 1e9
    large = torch.zeros(2**26), torch.zeros(2**26)
    bandwidth = 2 * 4 * 2**26 / min(interleaved({"copy": partial(large[0].copy_, large[1])}, 10)["copy"]) / 1e9
    lines = []
    for kind, factorized in (("dense", False), ("factorized", True)):
        model = NETWORKS[RESNET20].factorized() if factorized else NETWORKS[RESNET20].dense()
        batch = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (BATCH,))

        def step(model: nn.Module = model, batch: Tensor = batch, labels: Tensor = labels) -> None:
            F.cross_entropy(model(batch), labels).backward()

        step()
        with FlopCounterMode(display=False) as flops, Traffic() as traffic:
            step()
        counts = [flops.get_total_flops() / 1e9, traffic.bytes["convolutions"] / 1e9, traffic.bytes["all"] / 1e9]
        times = [counts[0] / rates[torch.float32], counts[1] / bandwidth, counts[2] / bandwidth]
        lines.append([kind, *(f"{count:.2f}" for count in counts), *(f"{1e3 * time:.0f}" for time in times)])
    header = ["ResNet20", "GFLOP", "GB of convolutions", "GB of all operators", "ms of arithmetic", "ms of their memory",
              "ms of all memory"]  # fmt: skip
    peaks = f"{rates[torch.float32]:.0f} GFLOP/s in float32, {rates[torch.bfloat16]:.0f} in bfloat16, {bandwidth:.0f} GB/s"
    show(args, f"What bounds an eager step: at the measured {peaks}", header, lines)


def main() -> None:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--no-compile", action="store_true", help="leave out the cases with torch.compile")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the reference's DataLoader")
    args = parser.parse_args()
    started = time.perf_counter()
    end_to_end(args)
    larger(args)
    limits(args)
    print(f"{time.perf_counter() - started:.0f} seconds", end="\n\n")


if __name__ == "__main__":
    main()
