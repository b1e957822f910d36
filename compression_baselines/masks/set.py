"""SET, sparse evolutionary training: Mocanu et al. (Nature Communications 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from compression_baselines.masks.base import RandomStart, random_subset, top


def drop(weight: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The mask without ``fraction`` of the weights of either sign, those closest to zero; zeros count as positive."""
    kept = mask.clone()
    for side in (mask & (weight >= 0), mask & (weight < 0)):
        distance = torch.where(side, -weight.abs(), -torch.inf)
        kept &= ~top(distance, int(fraction * int(side.sum())))
    return kept


class Set(RandomStart):
    """Starts from random masks. Replaces each layer's weights closest to zero by as many at random places."""

    def after_step(self, step: int) -> None:
        if not self.settings.due(step):
            return
        assert self.settings.drop_fraction is not None
        generator = self.generator(step + 1)
        for name, weight in self.masks.weights().items():
            mask = self.masks.mask(name)
            if mask.all():  # nowhere else to grow
                continue
            kept = drop(weight, mask, self.settings.drop_fraction)
            self.masks.assign({name: kept})  # zeroes dropped weights, which may grow again at once
            grown = random_subset(~kept, int(mask.sum() - kept.sum()), generator)
            self.masks.assign({name: kept | grown})
