"""SNIP: Lee et al. (ICLR 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.vision.data import Batch
from compression_baselines.masks.base import Method, top_global, weights_of


def scores(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """|w dL/dw| of every weight, with L the sum over the batches of their mean cross-entropy."""
    weights = weights_of(model)
    model.train()
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in batches:
        loss = F.cross_entropy(model(batch.images), batch.labels)
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += gradient
    return {name: (weight.detach() * total[name]).abs() for name, weight in weights.items()}


class Snip(Method):
    """Before training, keeps the weights whose removal changes the loss most."""

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.masks.assign(top_global(scores(model, batches), self.settings.nonzero))
