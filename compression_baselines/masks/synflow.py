"""SynFlow: Tanaka et al. (NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.vision.data import Batch
from compression_baselines.masks.base import Method, top_global, weights_of

ITERATIONS = 100


def scores(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """w dR/dw of every weight of a model whose parameters are not negative, with R the sum of outputs for one image."""
    weights = weights_of(model)
    gradients = torch.autograd.grad(model(image).sum(), list(weights.values()))
    return {name: weight.detach() * part for (name, weight), part in zip(weights.items(), gradients, strict=True)}


class Synflow(Method):
    """Before training and without data, prunes in 100 steps by the flow through the network of absolute weights."""

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        device = batches[0].images.device
        model.eval().to("cpu" if device.type == "mps" else device).double()  # products over all layers overflow float32
        with torch.no_grad():
            for value in model.state_dict().values():
                value.abs_()
        image = torch.ones_like(batches[0].images[:1]).to(next(model.parameters()))
        full = sum(size.numel() for size in self.masks.sizes().values())
        masks: dict[str, Tensor] = {}
        for iteration in range(1, ITERATIONS + 1):
            nonzero = round(full * (self.settings.nonzero / full) ** (iteration / ITERATIONS))
            masks = top_global(scores(model, image), nonzero)
            with torch.no_grad():
                for name, weight in weights_of(model).items():
                    weight.mul_(masks[name])
        self.masks.assign(masks)
