"""Chooses the units to remove: the least important ones of all layers together, down to a ratio or a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from common.budget import closest_index


class Ranking:
    """The units of all groups in one order of importance.

    scores:  for each group, the scores of its units, 1-d; higher is more important.
    limit:   at most this share of a group's units is removed, and never all of them.
    """

    def __init__(self, scores: Mapping[str, Tensor], limit: float) -> None:
        self.scores = {name: score.detach().cpu() for name, score in scores.items()}
        flat = torch.cat(list(self.scores.values()))
        if not flat.isfinite().all():
            broken = next(name for name, score in self.scores.items() if not score.isfinite().all())
            raise ValueError(f"the scores of {broken} are not finite: the network or its Fisher has diverged")
        self.units = len(flat)
        rank = torch.empty(self.units, dtype=torch.long)
        rank[flat.argsort(stable=True)] = torch.arange(self.units)
        self._ranks = dict(zip(self.scores, rank.split([len(score) for score in self.scores.values()]), strict=True))
        self._stay = {}
        for name, ranks in self._ranks.items():
            count = max(1, math.ceil((1 - limit) * len(ranks) - 1e-9))
            self._stay[name] = ranks >= ranks.sort(descending=True).values[count - 1]

    def kept(self, removed: int) -> dict[str, list[int]]:
        """Units of each group to keep when the ``removed`` least important of all go, as far as the limit allows."""
        stay = {name: (ranks >= removed) | self._stay[name] for name, ranks in self._ranks.items()}
        return {name: mask.nonzero()[:, 0].tolist() for name, mask in stay.items()}


def removed_for_budget(ranking: Ranking, budget: int, count: Callable[[dict[str, list[int]]], int]) -> int:
    """How many units to remove so that the parameter count is closest to ``budget``; ``count`` falls as units go.

    Raises ValueError, naming the floor, if more parameters stay even after all that the limit allows is removed. Also raises
    it, naming the ceiling, if there are fewer parameters before anything is removed, as in depthwise layers.
    """
    floor, ceiling = count(ranking.kept(ranking.units)), count(ranking.kept(0))
    if floor > budget:
        raise ValueError(f"a budget of {budget:,} parameters cannot be reached: at this --prune-ratio-limit, {floor:,} remain")
    if ceiling < 0.99 * budget:
        raise ValueError(f"a budget of {budget:,} parameters cannot be reached: this method has at most {ceiling:,}")
    return closest_index(lambda removed: count(ranking.kept(removed)), 0, ranking.units, budget)
