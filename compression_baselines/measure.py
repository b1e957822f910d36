"""What a trained network costs, as trained, folded and dense: python compression_baselines/measure.py CHECKPOINT."""

from __future__ import annotations

import copy
import io
import json
import math
import statistics
import sys
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from common.experiments.config import FlagParser, positive_int, say_interrupted

if __name__ == "__main__":
    say_interrupted("compression_baselines/measure.py")  # also while torch is loaded

import torch
from tabulate import tabulate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common.budget import count_parameters
from common.experiments import checkpoints
from common.experiments.distributed import find_device
from common.experiments.files import write_json
from common.experiments.runs import clean_errors, environment
from common.layers import Factorized
from common.surgery import densify_
from common.vision.experiment import rebuild
from compression_baselines.structure import ARCHITECTURE, build

BATCHES = (1, 128)
FILE = "measure.json"  # written with --measure


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create and that are alive at the same time; ``peak`` is the maximum.

    Tensors that existed before, such as weights, and views of them are not counted.
    """

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._seen and storage.nbytes():
                    self._seen.add(key)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def index_bits(model: nn.Module) -> int:
    """Bits that encode where the non-zeros of sparse weights are: a bitmap or a list of positions, whichever is smaller."""
    bits = 0
    for parameter in model.parameters():
        nonzero = int(torch.count_nonzero(parameter))
        if parameter.ndim > 1 and nonzero < parameter.numel():
            bits += min(parameter.numel(), nonzero * math.ceil(math.log2(parameter.numel())))
    return bits


@torch.inference_mode()
def latency(model: nn.Module, x: torch.Tensor, repeats: int) -> float:
    """Median seconds of a forward pass."""
    synchronize = partial(torch.cuda.synchronize, x.device) if x.device.type == "cuda" else lambda: None
    seconds = []
    for repeat in range(repeats + 2):  # two to warm up
        synchronize()
        started = time.perf_counter()
        model(x)
        synchronize()
        if repeat >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def cost(model: nn.Module, image_size: int, repeats: int = 5) -> dict[str, Any]:
    """Size of a model, and its multiply-adds, latency (seconds) and peak activations (bytes) at batch 1 and 128."""
    model.eval()
    device = next(model.parameters()).device
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    found: dict[str, Any] = {
        "parameters": count_parameters(model),
        # Zeros are left out in weights only, not in biases and normalizations.
        "nonzero": sum(int(torch.count_nonzero(p)) if p.ndim > 1 else p.numel() for p in model.parameters()),
        "index_bits": index_bits(model),
        "checkpoint_bytes": file.tell(),
    }
    for batch in BATCHES:
        x = torch.randn(batch, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        with torch.no_grad(), PeakMemory([x, *model.parameters(), *model.buffers()]) as memory:
            model(x)
        found[f"batch{batch}"] = {
            "multiply_adds": counter.get_total_flops() // 2,
            "latency": latency(model, x, repeats),
            "peak_activation_bytes": memory.peak,
        }
    return found


def costs(model: nn.Module, architecture: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Cost of a model as trained, of the model folded into ordinary layers if it is factorized, and of the dense network."""
    dense = build({**architecture, "pruned": None})
    device = next(model.parameters()).device
    measured = {"as trained": cost(model, image_size)}
    if any(isinstance(module, Factorized) for module in model.modules()):
        folded = copy.deepcopy(model)
        densify_(folded)
        measured["folded"] = cost(folded, image_size)
    measured["dense"] = cost(dense.to(device), image_size)
    return {"image_size": image_size, "models": measured, "environment": environment(device)}


def write(directory: Path, model: nn.Module, architecture: Mapping[str, Any], image_size: int) -> None:
    """Measure the cost of a trained model, write it to measure.json and print it."""
    measured = costs(model, architecture, image_size)
    write_json(directory / FILE, measured)
    show(measured)


def show(measured: Mapping[str, Any], file: Any = None) -> None:
    """Print a table of costs."""
    header = ["model", "parameters", "non-zeros", "file MB"]
    header += [f"{name} (batch {batch})" for batch in BATCHES for name in ("M multiply-adds", "ms", "peak MB")]
    rows = []
    for name, found in measured["models"].items():
        row = [name, f"{found['parameters']:,}", f"{found['nonzero']:,}", f"{found['checkpoint_bytes'] / 1e6:.2f}"]
        for batch in BATCHES:
            at = found[f"batch{batch}"]
            row += [
                f"{at['multiply_adds'] / 1e6:,.0f}",
                f"{at['latency'] * 1e3:.1f}",
                f"{at['peak_activation_bytes'] / 1e6:.1f}",
            ]
        rows.append(row)
    print(tabulate(rows, header, tablefmt="github", disable_numparse=True), file=file or sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = FlagParser(prog="compression_baselines/measure.py", description="Measure what a trained network costs.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--image-size", type=positive_int, help="pixels (default: those the checkpoint was trained on)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1, mps, or the number of a GPU")
    args = parser.parse_args(argv)
    with clean_errors(parser.prog):
        state = checkpoints.load(args.checkpoint)
        if "architecture" not in state:
            raise ValueError(f"{args.checkpoint} does not record its architecture: it is not a checkpoint of this program")
        model = rebuild(state, args.checkpoint, dict.fromkeys(ARCHITECTURE), build).to(find_device(args.device))
        size = args.image_size or state.get("config", {}).get("image_size")
        if size is None:
            raise ValueError(f"{args.checkpoint} does not record the size of its images: give --image-size, in pixels")
        measured = costs(model, state["architecture"], size)
    show(measured)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
