"""Code shared by the compression programs: network, normalization of images, schedule, and measurement of cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from common.vision.data import CIFAR10, CIFAR100
from common.vision.experiment import ImageExperiment
from compression_baselines import measure, structure
from compression_baselines.config import CompressionConfig, FreshNetworkConfig

C = TypeVar("C", bound=CompressionConfig)

_TINY_IMAGENET = ((0.48024579, 0.44807218, 0.39754775), (0.27698641, 0.26906449, 0.28208191))
NORMALIZATIONS = {"cifar100": CIFAR100, "tiny_imagenet": _TINY_IMAGENET}  # digits and image folders: as CIFAR-10


class CompressionExperiment(ImageExperiment[C]):
    """A run on ResNet or VGG."""

    def make_architecture(self) -> dict[str, Any]:
        return structure.architecture(self.config)

    def build(self, architecture: Mapping[str, Any]) -> nn.Module:
        return structure.build(architecture)

    def data_options(self) -> dict[str, Any]:
        return {"normalization": NORMALIZATIONS.get(self.config.data, CIFAR10)}

    def outputs(self) -> list[str]:
        return [measure.FILE] * self.config.measure + super().outputs()

    def check_image_size(self) -> None:
        """Raise ValueError if images are too small for the network."""
        size = self.data.image_size
        if self.config.network == "vgg" and size < 32:
            raise ValueError(f"vgg halves its images five times and needs at least 32 pixels, got {size}: give --image-size 32")

    def measure(self, model: nn.Module) -> None:
        """With --measure, measure and write the cost of a trained model. The model may be changed."""
        if self.config.measure and self.processes.main:
            measure.write(self.run.path, model, self.architecture, self.data.image_size)


@torch.no_grad()
def start_classifier_(model: nn.Module, config: FreshNetworkConfig) -> None:
    """Set the classifier's bias as --classifier-bias says, before any weights are loaded. Draws no random number."""
    if config.classifier_bias == "zero":
        classifier = model.get_submodule("linear" if config.network == "resnet" else "classifier")
        nn.init.zeros_(cast(nn.Linear, classifier).bias)


def learning_rate(config: CompressionConfig, epoch: int) -> float:
    """The learning rate: divided by 10 at one half and three quarters of ``config.epochs``; starts again in every round."""
    return config.lr * 0.1 ** sum(epoch % config.epochs >= share * config.epochs for share in (0.5, 0.75))
