"""GraSP: Wang et al. (ICLR 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.vision.data import Batch
from compression_baselines.masks.base import Method, top_global, weights_of

TEMPERATURE = 200.0  # logits are divided by it, as in the authors' code


def scores(model: nn.Module, batches: Sequence[Batch], temperature: float = TEMPERATURE) -> dict[str, Tensor]:
    """w (H g) of every weight; g and H are gradient and Hessian of the sum of the batches' mean cross-entropies.

    Removing a weight changes the squared norm of the gradient by -2 w (H g) to first order, so weights with high scores stay.
    """
    weights = weights_of(model)
    leaves = list(weights.values())
    model.train()

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.images) / temperature, batch.labels)

    gradient = [torch.zeros_like(leaf) for leaf in leaves]
    for batch in batches:
        gradient = [total + part for total, part in zip(gradient, torch.autograd.grad(loss(batch), leaves), strict=True)]
    product = [torch.zeros_like(leaf) for leaf in leaves]
    for batch in batches:
        again = torch.autograd.grad(loss(batch), leaves, create_graph=True)
        inner = torch.stack([(one * other).sum() for one, other in zip(again, gradient, strict=True)]).sum()
        product = [total + part for total, part in zip(product, torch.autograd.grad(inner, leaves), strict=True)]
    return {name: weight.detach() * part for (name, weight), part in zip(weights.items(), product, strict=True)}


class Grasp(Method):
    """Before training, keeps the weights whose removal would lower the norm of the gradient most."""

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.masks.assign(top_global(scores(model, batches), self.settings.nonzero))
