"""Deep rewiring: Bellec et al. (ICLR 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.vision.data import Batch
from compression_baselines.masks.base import Masks, RandomStart, Settings, random_subset


class Deepr(RandomStart):
    """Starts from random masks and gives every weight a sign. One that crosses zero is replaced by a random one of its layer.

    After each step, weights also decay towards zero by lr * l1 and take a random step of deviation sqrt(2 * lr * temperature).
    """

    def __init__(self, masks: Masks, settings: Settings) -> None:
        super().__init__(masks, settings)
        self.signs: dict[str, Tensor] = {}

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        super().start(model, batches)
        self.signs = {name: torch.where(weight < 0, -1, 1).to(torch.int8) for name, weight in self.masks.weights().items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        assert self.masks.optimizer is not None
        assert self.settings.l1 is not None
        assert self.settings.temperature is not None
        rate = self.masks.optimizer.param_groups[0]["lr"]
        generator = self.generator(step + 1)
        for name in self.masks.layers:
            weight, mask, sign = self.masks.parameter(name), self.masks.mask(name), self.signs[name]
            noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
            walk = (2 * rate * self.settings.temperature) ** 0.5 * noise
            weight += torch.where(mask, walk - rate * self.settings.l1 * sign, 0)
            kept = mask & (weight * sign >= 0)
            gone = int(mask.sum() - kept.sum())
            if gone:
                self.masks.assign({name: kept})
                grown = random_subset(~kept, gone, generator)
                flips = torch.randint(0, 2, sign.shape, generator=generator, device=sign.device, dtype=torch.int8) * 2 - 1
                self.signs[name] = torch.where(grown, flips, sign)
                self.masks.assign({name: kept | grown})

    def state_dict(self) -> dict[str, Any]:
        return {"signs": self.signs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.signs = {name: sign.to(self.masks.parameter(name).device) for name, sign in state["signs"].items()}
