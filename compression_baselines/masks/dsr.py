"""Dynamic sparse reparameterization: Mostafa & Wang (ICML 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compression_baselines.masks.base import Masks, RandomStart, Settings, largest_remainder, random_subset, top

TOLERANCE = 0.1  # share by which the number of dropped weights may miss its goal before the threshold moves


def drop(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """The masks without weights below the threshold; a layer that would be empty keeps its largest weight."""
    kept = {}
    for name, mask in masks.items():
        magnitude = weights[name].abs()
        kept[name] = mask & (magnitude >= threshold)
        if not kept[name].any():
            kept[name] = top(magnitude.where(mask, -1.0), 1)
    return kept


def growth(kept: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """How many of ``total`` weights each layer grows: in proportion to those that it kept, as far as it has room."""
    alive = {name: int(mask.sum()) for name, mask in kept.items()}
    room = {name: mask.numel() - alive[name] for name, mask in kept.items()}
    exact = {name: total * alive[name] / sum(alive.values()) for name in kept}
    return largest_remainder(exact, total, room, least=0)


class Dsr(RandomStart):
    """Starts from random masks. Drops weights below an adaptive threshold of all layers; regrows where most survived."""

    def __init__(self, masks: Masks, settings: Settings) -> None:
        super().__init__(masks, settings)
        self.threshold = 1e-3

    def after_step(self, step: int) -> None:
        if not self.settings.due(step):
            return
        assert self.settings.drop_fraction is not None
        generator, goal = self.generator(step + 1), self.settings.drop_fraction * self.settings.nonzero
        kept = drop(self.masks.weights(), {name: self.masks.mask(name) for name in self.masks.layers}, self.threshold)
        dropped = self.settings.nonzero - sum(int(mask.sum()) for mask in kept.values())
        self.masks.assign(kept)
        grown = {name: random_subset(~kept[name], count, generator) for name, count in growth(kept, dropped).items()}
        self.masks.assign({name: mask | grown[name] for name, mask in kept.items()})
        if dropped < (1 - TOLERANCE) * goal:
            self.threshold *= 2
        elif dropped > (1 + TOLERANCE) * goal:
            self.threshold /= 2

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.threshold = state["threshold"]
