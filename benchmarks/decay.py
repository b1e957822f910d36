"""Time Frobenius decay as part of a training step: python -m benchmarks.decay [--repeats N] [--markdown].

For image networks at batch 128 of 32x32 images, the decay is ``FrobeniusDecay.step``. For the small Transformer on a batch of
about 4,000 target tokens, it is the forward and backward pass of ``FrobeniusDecay.penalty``. Steps and decay take turns. The
operators that compute something are counted, since on a GPU each of them launches a kernel; a loop over layers would launch
some for every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18

from benchmarks.networks import NETWORKS, Network
from benchmarks.timing import arguments, interleaved, ratio, show, spread
from benchmarks.translation import batch
from common import FrobeniusDecay, param_groups
from common.experiments import distributed
from common.layers import Factorized
from transformer_iwslt.model import PAD, Transformer, TransformerConfig, frobenius_decay

Calls = tuple[Callable[[], object], Callable[[], object], int]  # a step with the decay, the decay alone, decayed products


class Operators(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "empty" in str(func) or "detach" in str(func))
        return func(*args, **(kwargs or {}))


def of_network(network: Network) -> Calls:
    model = network.factorized().to(memory_format=torch.channels_last)
    decay = FrobeniusDecay(model, 1e-4)
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=1e-4, decay=decay), lr=0.01, momentum=0.9)
    images = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (128,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        decay.step()
        optimizer.step()

    return step, decay.step, sum(isinstance(module, Factorized) for module in model.modules())


def of_transformer(scale: float, words: int = 10_000) -> Calls:
    model = Transformer(TransformerConfig(words, words, rank_scale=scale, init="spectral"))
    decay = frobenius_decay(model, 1e-4, layers=True, query_key=True, output_value=True)
    assert decay is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sample = batch(words)
    source, before = sample["net_input"]["src_tokens"], sample["net_input"]["prev_output_tokens"]

    def penalty() -> None:
        decay.penalty().backward()

    def step() -> None:
        optimizer.zero_grad()
        scores = model(source, before)
        loss = F.cross_entropy(scores.flatten(0, 1), sample["target"].flatten(), ignore_index=PAD, label_smoothing=0.1)
        (loss + decay.penalty()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    return step, penalty, sum(isinstance(module, Factorized) for module in model.modules()) + len(decay.pairs)


def main() -> None:
    args = arguments(__doc__, repeats=7).parse_args()
    torch.manual_seed(0)
    distributed.start("cpu")
    names = ["ResNet20, rank scale 0.111", "ResNet18, rank scale 0.1", "VGG19, 10 %"]
    inner = NETWORKS["ResNet18, rank scale 0.1"].is_factorized
    small = Network(lambda: resnet18(num_classes=10), inner, scale=0.1)
    cases = {name: of_network(NETWORKS[name]) for name in names}
    cases["ResNet18 with torchvision's stem, to 8x8 pixels"] = of_network(small)
    cases["Transformer (small), rank scale 0.5"] = of_transformer(0.5)
    calls = {f"{name}{part}": call for name, both in cases.items() for part, call in zip(("", " decay"), both[:2], strict=True)}
    seconds = interleaved(calls, args.repeats)
    lines = []
    for name, (_, decay, products) in cases.items():
        with Operators() as operators:
            decay()
        times = [spread(seconds[name]), spread(seconds[f"{name} decay"])]
        lines.append([name, *times, f"{ratio(seconds[f'{name} decay'], seconds[name]):.1%}", products, operators.count])
    header = ["model", "step, ms", "of which decay, ms", "share", "products decayed", "operators in it"]
    show(args, "Frobenius decay in a training step", header, lines)


if __name__ == "__main__":
    main()
