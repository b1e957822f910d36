"""The networks that benchmarks compare, in dense and factorized form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from torch import nn
from torchvision.models import resnet18

from common import LowRankConfig, factorize_, rank_scale_for_ratio
from compression_baselines import models as compression
from resnet_cifar import models as resnets
from tensor_wrn import factorize as tensors
from tensor_wrn import models as wrn

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Network:
    """A dense network, the layers to factorize, and how far: to a rank scale or to a ratio of parameters."""

    dense: Callable[[], nn.Module]
    is_factorized: Filter
    scale: float = 0.0
    ratio: float = 0.0

    def rank_scale(self, model: nn.Module) -> float:
        return self.scale or rank_scale_for_ratio(model, self.ratio, filter_fn=self.is_factorized)

    def factorized(self, init: Literal["spectral", "regular"] = "spectral") -> nn.Module:
        model = self.dense()
        config = LowRankConfig(self.rank_scale(model), init=init)
        factorize_(model, config, filter_fn=self.is_factorized, skip_growing=False)
        return model


_TENSOR_TRAIN = {"depth": 16, "width": 4, "num_classes": 10, "form": "TensorTrain"}


class TensorNetwork(Network):
    """WideResNet16-4 with Tensor-Train convolutions."""

    def factorized(self, init: Literal["spectral", "regular"] = "spectral") -> nn.Module:
        return tensors.make_tensors({**_TENSOR_TRAIN, "rank_scale": _tensor_scale(self.ratio)}, init)[0]


@cache
def _tensor_scale(ratio: float) -> float:
    return tensors.tensor_scale_for_ratio({**_TENSOR_TRAIN, "rank_scale": 1.0}, ratio)


def cifar_resnet18() -> nn.Module:
    """torchvision's ResNet18 with the usual stem for 32x32 images: 3x3, stride 1, no pooling."""
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def _inner_convolution(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Conv2d) and name != "conv1"


NETWORKS = {
    "ResNet20, rank scale 0.111": Network(lambda: resnets.build("resnet20", 10), resnets.is_factorized, scale=0.111),
    "ResNet32 [64, 128, 256], 10 %": Network(lambda: compression.ResNet(32, 64, 10), compression.is_factorized, ratio=0.1),
    "VGG19, 10 %": Network(lambda: compression.VGG(19, 10), compression.is_factorized, ratio=0.1),
    "WRN16-4 Conv, 6.667 %": Network(lambda: wrn.WideResNet(16, 4, 10), wrn.is_factorized, ratio=0.06667),
    "WRN16-4 TensorTrain, 6.667 %": TensorNetwork(lambda: wrn.WideResNet(16, 4, 10), wrn.is_factorized, ratio=0.06667),
    "ResNet18, rank scale 0.1": Network(cifar_resnet18, _inner_convolution, scale=0.1),
    "WRN28-10, 1.667 %": Network(lambda: wrn.WideResNet(28, 10, 10), wrn.is_factorized, ratio=0.01667),
    "WRN28-10, 6.667 %": Network(lambda: wrn.WideResNet(28, 10, 10), wrn.is_factorized, ratio=0.06667),
}
