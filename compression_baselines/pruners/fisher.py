"""The Fisher information of a network's convolutions, by nngeometry: Kronecker factors and diagonals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from nngeometry.object import PMatDiag, PMatKFAC
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.vision.data import Data


class _TrainingImages(Dataset[tuple[Tensor, Tensor]]):
    """The first batches of a training run's first epoch, as a data set."""

    def __init__(self, data: Data, count: int, batch_size: int, seed: int) -> None:
        self.data, self.count, self.batch_size, self.seed = data, count, batch_size, seed

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        batch = self.data.train_batch(self.seed, 0, indices[0] // self.batch_size, self.batch_size)
        return batch.images[: len(indices)].contiguous(), batch.labels[: len(indices)]


def loader(data: Data, count: int | None, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of ``count`` training images (None: all), augmented as in the first epoch of a run with this seed."""
    images = _TrainingImages(data, min(count or len(data), len(data)), batch_size, seed)
    return DataLoader(images, batch_size, collate_fn=lambda batch: batch)


def _log_likelihood(model: nn.Module, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Log-probability of labels: drawn from the network for the "true" Fisher, the given ones for the "empirical"."""

    def function(images: Tensor, labels: Tensor) -> Tensor:
        log_probabilities = torch.log_softmax(model(images), 1)
        if kind == "true":
            labels = torch.multinomial(log_probabilities.detach().exp(), 1)[:, 0]
        return log_probabilities.gather(1, labels[:, None])

    return function


def _backend(model: nn.Module, layers: Iterable[nn.Module], kind: str) -> Any:
    collection = LayerCollection()
    for layer in layers:  # not batch normalization, for which nngeometry has no Kronecker factors
        collection.add_layer_from_model(model, layer)
    model.eval()
    return TorchHooksJacobianBackend(model, function=_log_likelihood(model, kind), layer_collection=collection)


def kronecker(
    model: nn.Module, layers: dict[str, nn.Conv2d], images: DataLoader[Any], kind: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors A (in * k * k, square) and G (out, square) of each layer's Fisher, G (x) A, float64 (KFC, Grosse & Martens).

    A is the mean over images of the sum over positions of a a^T, G the mean over both of g g^T.
    """
    found = PMatKFAC(_backend(model, layers.values(), kind), examples=images).data
    return {name: (a.double(), g.double()) for name, (a, g) in zip(layers, found.values(), strict=True)}


def diagonal(model: nn.Module, layers: dict[str, nn.Conv2d], images: DataLoader[Any], kind: str) -> dict[str, Tensor]:
    """Diagonal of each layer's Fisher in the shape of its weight: the mean square of the gradients of single images."""
    sizes = [layer.weight.numel() for layer in layers.values()]
    flat = PMatDiag(_backend(model, layers.values(), kind), examples=images).data.double().split(sizes)
    return {name: part.view_as(layers[name].weight) for name, part in zip(layers, flat, strict=True)}
