"""What Frobenius decay costs beside the rest of a training step: python -m benchmarks.decay [--repeats N].

Image networks at batch 128 of 32x32 images, where the decay is ``FrobeniusDecay.step``, and the small Transformer on a batch of
about 4,000 target tokens, where it is the forward and backward pass of ``FrobeniusDecay.penalty``. Steps and decay are timed
in turns. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from torchvision.models import resnet18

from benchmarks.timing import interleaved, machine, ratio, spread
from benchmarks.translation import batch
from common import FrobeniusDecay, LowRankConfig, factorize_, param_groups, rank_scale_for_ratio
from common.runs import positive_int
from compression_baselines import models as compression
from resnet_cifar import models as resnets
from transformer_iwslt.model import PAD, Transformer, TransformerConfig, frobenius_decay

Calls = tuple[Callable[[], object], Callable[[], object]]  # a step with the decay, and the decay alone


def network(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool], scale: float) -> Calls:
    factorize_(model.to(memory_format=torch.channels_last), LowRankConfig(scale), filter_fn=filter_fn)
    decay = FrobeniusDecay(model, 1e-4)
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=1e-4, decay=decay), lr=0.01, momentum=0.9)
    images = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (128,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        decay.step()
        optimizer.step()

    return step, decay.step


def transformer(scale: float, words: int = 10_000) -> Calls:
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

    return step, penalty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive_int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    vgg, resnet = compression.VGG(19, 10), resnet18(num_classes=10)
    convolutions = {id(m) for m in resnet.modules() if isinstance(m, nn.Conv2d) and m is not resnet.conv1}
    scale = rank_scale_for_ratio(vgg, 0.1, filter_fn=compression.is_factorized)
    cases = {
        "ResNet20, rank scale 0.111": network(resnets.build("resnet20", 10), resnets.is_factorized, 0.111),
        "ResNet18 (torchvision), rank scale 0.1": network(resnet, lambda module, name: id(module) in convolutions, 0.1),
        "VGG19, 10 %": network(vgg, compression.is_factorized, scale),
        "Transformer (small), rank scale 0.5": transformer(0.5),
    }
    calls = {f"{name}{part}": call for name, both in cases.items() for part, call in zip(("", " decay"), both, strict=True)}
    seconds = interleaved(calls, args.repeats)
    lines = [
        [name, spread(seconds[name]), spread(seconds[f"{name} decay"]), f"{ratio(seconds[f'{name} decay'], seconds[name]):.1%}"]
        for name in cases
    ]
    print(f"{machine()}, {args.repeats} repeats\n")
    header = ["model", "step, ms", "of which decay, ms", "share"]
    print(tabulate(lines, header, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
