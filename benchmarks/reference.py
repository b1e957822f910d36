"""A plain reference for speed: an independent version of factorized ResNet training as in the paper's released code.

It has two thin convolutions per layer, in eager mode, on float32 images in the default memory format. Frobenius decay is
computed layer by layer through the product of the factors. torchvision transforms PIL images one by one in a DataLoader.

Layers of other libraries, with about as many parameters, can replace the thin convolutions: a k x k convolution to r channels
followed by a 1x1 convolution, as Composer's surgery makes it, and tensorly-torch's Tucker convolution, if that package is
installed (``pip install tensorly-torch``). They have no Frobenius decay.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from common.vision.data import IMAGENET


class Transformed(Dataset):
    """Images of an array (N, 32, 32, 3) of bytes, with torchvision's transforms."""

    def __init__(self, pixels: np.ndarray, labels: Sequence[int]) -> None:
        self.pixels, self.labels = pixels, labels
        steps = [transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, 4), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(*IMAGENET)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class ThinConvolutions(nn.Module):
    """A 3x3 convolution of rank r as a (1, 3) and a (3, 1) convolution of the matrices V^T and U."""

    def __init__(self, donor: nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.donor = (donor.in_channels, donor.out_channels, donor.stride[0])
        self.u = nn.Parameter(nn.init.kaiming_normal_(torch.empty(3 * donor.out_channels, rank)))
        self.vt = nn.Parameter(nn.init.kaiming_normal_(torch.empty(rank, 3 * donor.in_channels)))

    def forward(self, x: Tensor) -> Tensor:
        in_channels, out_channels, stride = self.donor
        across = self.vt.view(-1, in_channels, 1, 3)
        down = self.u.view(out_channels, 3, -1).transpose(1, 2).unsqueeze(-1)
        return F.conv2d(F.conv2d(x, across, None, (1, stride), (0, 1)), down, None, (stride, 1), (1, 0))

    @torch.no_grad()
    def decay(self, coef: float) -> None:
        product = self.u @ self.vt
        for factor, grad in ((self.u, product @ self.vt.T), (self.vt, self.u.T @ product)):
            assert factor.grad is not None
            factor.grad.add_(grad, alpha=coef)


def thin(donor: nn.Conv2d, scale: float) -> nn.Module:
    return ThinConvolutions(donor, max(1, round(scale * 3 * donor.out_channels)))


def through_few_channels(donor: nn.Conv2d, scale: float) -> nn.Module:
    budget = 6 * round(scale * 3 * donor.out_channels) * donor.out_channels  # parameters, approximately
    rank = max(1, round(budget / (9 * donor.in_channels + donor.out_channels)))
    first = nn.Conv2d(donor.in_channels, rank, 3, stride=donor.stride[0], padding=1, bias=False)
    return nn.Sequential(first, nn.Conv2d(rank, donor.out_channels, 1, bias=False))


def tensorly_tucker(donor: nn.Conv2d, scale: float) -> nn.Module:
    layer: Any = importlib.import_module("tltorch").FactorizedConv.from_conv(
        donor, rank=1.7 * scale, factorization="tucker", decompose_weights=True, implementation="factorized"
    )
    return layer


PLAIN = "plain reference"
LAYERS: dict[str, Callable[[nn.Conv2d, float], nn.Module]] = {
    PLAIN: thin,
    "k x k to r channels, then 1x1 (Composer)": through_few_channels,
    "Tucker (tensorly-torch)": tensorly_tucker,
}


def available() -> list[str]:
    """The layers whose libraries are installed."""
    return [name for name in LAYERS if "tensorly-torch" not in name or importlib.util.find_spec("tltorch")]


def factorize(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool],
    scale: float,
    make: Callable[[nn.Conv2d, float], nn.Module],
) -> list[ThinConvolutions]:
    """Replace the selected convolutions of a model in place. Returns the new layers that have Frobenius decay."""
    layers = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and filter_fn(module, name):
            layer = make(module, scale)
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, layer)
            layers += [layer] if isinstance(layer, ThinConvolutions) else []
    return layers


def training(
    model: nn.Module, layers: list[ThinConvolutions], images: Transformed, workers: int, steps: int
) -> Callable[[], None]:
    """A function that trains for ``steps`` steps of 128 images: data, step, decay and metrics."""
    factors = [factor for layer in layers for factor in (layer.u, layer.vt)]
    known = {id(factor) for factor in factors}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [{"params": rest, "weight_decay": 1e-4}, {"params": factors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    loader = DataLoader(images, 128, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def train() -> None:
        for _ in range(steps):
            inputs, targets = next(batches)
            output = model(inputs)
            loss = F.cross_entropy(output, targets)
            optimizer.zero_grad()
            loss.backward()
            for layer in layers:
                layer.decay(1e-4)
            optimizer.step()
            loss.item(), output.argmax(1).eq(targets).float().mean().item()

    return train
