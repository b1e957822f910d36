"""The lottery ticket: Frankle & Carbin (ICLR 2019), with rewinding as in Frankle et al. (ICML 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compression_baselines.masks.base import Masks, Settings
from compression_baselines.masks.magnitude import Magnitude


class Lottery(Magnitude):
    """Trains in rounds. Between rounds, removes the smallest weights and rewinds the others to an early epoch's values.

    The density falls by the same factor between rounds, and the last round trains at the target. Every round trains for all
    its epochs, with the whole learning-rate schedule and momentum from zero.
    """

    def __init__(self, masks: Masks, settings: Settings) -> None:
        super().__init__(masks, settings)
        self.early: dict[str, Tensor] = {}  # state to rewind to, without the masks

    def _state(self) -> dict[str, Tensor]:
        """Every tensor of the model except the masks."""
        return {name: value for name, value in self.masks.model.state_dict().items() if not name.endswith("weight_mask")}

    @torch.no_grad()
    def before_epoch(self, epoch: int) -> None:
        assert self.settings.rounds is not None
        assert self.settings.rewind is not None
        if epoch == self.settings.rewind:
            self.early = {name: value.clone() for name, value in self._state().items()}
        number, first = divmod(epoch, self.settings.epochs)
        if number and not first:
            full = sum(size.numel() for size in self.masks.sizes().values())
            nonzero = round(full * (self.settings.nonzero / full) ** (number / (self.settings.rounds - 1)))
            magnitudes = {name: weight.abs() for name, weight in self.masks.weights().items()}
            masks = self.smallest_out(magnitudes, nonzero)
            for name, value in self._state().items():
                value.copy_(self.early[name])
            self.masks.assign(masks)
            if self.masks.optimizer is not None:
                self.masks.optimizer.state.clear()

    def after_step(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"early": self.early}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        now = self._state()
        self.early = {name: value.to(now[name].device) for name, value in state["early"].items()}

    def best_from(self) -> int:
        assert self.settings.rounds is not None
        return (self.settings.rounds - 1) * self.settings.epochs
