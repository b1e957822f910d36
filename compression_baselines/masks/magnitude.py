"""Gradual magnitude pruning: Zhu & Gupta, To prune, or not to prune (2017)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from common.vision.data import Batch
from compression_baselines.masks.base import Method, allocate, top, top_global


class Magnitude(Method):
    """Removes the smallest weights during training: the remaining share falls like (1 - t / T)^3 from all to the target."""

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        pass

    def wanted(self, step: int) -> int:
        """Non-zeros after step ``step``."""
        left = max(0.0, 1 - (step + 1) / self.settings.last_update)
        full = sum(size.numel() for size in self.masks.sizes().values())
        return self.settings.nonzero + int((full - self.settings.nonzero) * left**3)

    def after_step(self, step: int) -> None:
        if self.settings.due(step) or step + 1 == self.settings.last_update:
            magnitudes = {name: weight.abs() for name, weight in self.masks.weights().items()}
            # If the network has diverged, the training loop ends the run.
            if all(magnitude.isfinite().all() for magnitude in magnitudes.values()):
                self.masks.assign(self.smallest_out(magnitudes, self.wanted(step)))

    def smallest_out(self, magnitudes: dict[str, Tensor], nonzero: int) -> dict[str, Tensor]:
        if self.settings.distribution == "global":
            return top_global(magnitudes, nonzero)
        counts = allocate(self.masks.sizes(), nonzero, self.settings.distribution or "uniform")
        return {name: top(magnitude, counts[name]) for name, magnitude in magnitudes.items()}

    def best_from(self) -> int:
        return (self.settings.last_update - 1) // self.settings.steps_per_epoch
