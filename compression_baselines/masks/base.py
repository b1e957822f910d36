"""Code shared by the sparse methods: masks on weights, the number of weights that each layer keeps, and the base class."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune

from common.vision.data import Batch


def maskable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights are masked: every convolution and linear layer. Biases and normalizations stay dense."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight of every maskable layer of a model without masks."""
    return {name: cast(nn.Parameter, layer.weight) for name, layer in maskable(model).items()}


class Masks:
    """torch.nn.utils.prune masks on the weights of a model's maskable layers, all ones at first.

    A weight outside its mask is exactly zero, and so is its momentum. A weight that enters the mask starts from zero.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layers = model, maskable(model)
        self.optimizer: torch.optim.Optimizer | None = None
        with torch.no_grad():  # otherwise the first weights tie the Parameters to this stream, and no graph can be recorded
            for layer in self.layers.values():
                prune.identity(layer, "weight")

    def mask(self, name: str) -> Tensor:
        """Which weights of a layer are in the mask; bool."""
        return cast(Tensor, self.layers[name].weight_mask).bool()

    def parameter(self, name: str) -> nn.Parameter:
        """A layer's weight as the optimizer trains it; zero outside the mask."""
        return cast(nn.Parameter, self.layers[name].weight_orig)

    def weights(self) -> dict[str, Tensor]:
        """The weights, detached."""
        return {name: self.parameter(name).detach() for name in self.layers}

    def sizes(self) -> dict[str, torch.Size]:
        return {name: self.parameter(name).shape for name in self.layers}

    def nonzero(self) -> int:
        """Number of weights in the masks of all layers."""
        return sum(int(self.mask(name).sum()) for name in self.layers)

    @torch.no_grad()
    def assign(self, masks: Mapping[str, Tensor]) -> None:
        """Set the masks of these layers. If several processes train together, all use the main process's."""
        for name, mask in masks.items():
            held = cast(Tensor, self.layers[name].weight_mask)
            held.copy_(mask)
            if dist.is_initialized():
                dist.broadcast(held, 0)
            parameter = self.parameter(name)
            parameter.mul_(held)
            for value in (self.optimizer.state[parameter] if self.optimizer is not None else {}).values():
                if isinstance(value, Tensor) and value.shape == held.shape:
                    value.mul_(held)


@dataclass(frozen=True)
class Settings:
    """The settings of a method. ``None`` stands for a flag that the method does not have, or for its own default.

    nonzero:          weights that the maskable layers keep together.
    steps:            optimizer steps of the whole training, of which ``steps_per_epoch`` make an epoch.
    epochs:           epochs of the training, or of one of its ``rounds``.
    distribution:     how the non-zeros are distributed over layers (see :func:`allocate`).
    update_every:     steps between changes of the masks (default: an epoch), until ``update_until`` of all steps.
    drop_fraction:    share of the non-zeros that a change replaces.
    """

    nonzero: int
    steps: int
    steps_per_epoch: int
    epochs: int
    seed: int = 0
    distribution: str | None = None
    update_every: int | None = None
    update_until: float | None = None
    drop_fraction: float | None = None
    rounds: int | None = None
    rewind: int | None = None
    l1: float | None = None
    temperature: float | None = None

    @property
    def last_update(self) -> int:
        """Number of steps after which the masks change for the last time."""
        return max(1, int((self.update_until or 1.0) * self.steps))

    def due(self, step: int) -> bool:
        """Whether the masks change at step ``step``, counted from 0."""
        made, every = step + 1, self.update_every or self.steps_per_epoch
        return made % every == 0 and made <= self.last_update and made < self.steps


class Method:
    """A way to choose masks, as a hook of the trainer. ``start`` chooses the first masks on an unmasked copy of the model."""

    def __init__(self, masks: Masks, settings: Settings) -> None:
        self.masks, self.settings = masks, settings

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        raise NotImplementedError

    def before_epoch(self, epoch: int) -> None:
        """Called before the first step of each epoch."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the masks, which are stored in the model."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def best_from(self) -> int:
        """First epoch that ends with no more than the target number of non-zeros."""
        return 0

    def generator(self, step: int) -> torch.Generator:
        """Random numbers that depend only on the seed and the step, and are equal in all processes."""
        device = next(iter(self.masks.weights().values())).device
        mixed = int(np.random.SeedSequence([self.settings.seed, step, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.Generator(device).manual_seed(mixed)


class RandomStart(Method):
    """A method that starts from random masks with the distribution of the settings."""

    def start(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        generator, masks = self.generator(0), self.masks
        counts = allocate(masks.sizes(), self.settings.nonzero, self.settings.distribution or "uniform")
        masks.assign(
            {name: random_subset(torch.ones_like(masks.mask(name)), count, generator) for name, count in counts.items()}
        )


def allocate(sizes: Mapping[str, Sequence[int]], nonzero: int, distribution: str) -> dict[str, int]:
    """Number of weights that each layer of shape ``sizes`` keeps, ``nonzero`` in all and at least one in each.

    "uniform": the same density in every layer. "erk": density in proportion to the sum of the weight's dimensions over
    their product (Erdos-Renyi-Kernel of RigL); layers that would exceed their size are dense.
    """
    full = {name: int(np.prod(size)) for name, size in sizes.items()}
    wish = {name: float(sum(size) if distribution == "erk" else full[name]) for name, size in sizes.items()}
    counts: dict[str, float] = {}
    while True:  # layers that are dense take their size, and the others share the rest
        rest = nonzero - sum(full[name] for name in counts)
        scale = rest / sum(value for name, value in wish.items() if name not in counts) if len(counts) < len(full) else 0.0
        dense = [name for name in wish if name not in counts and wish[name] * scale >= full[name]]
        if not dense:
            break
        counts |= {name: full[name] for name in dense}
    exact = {name: counts.get(name, wish[name] * scale) for name in sizes}
    return largest_remainder(exact, nonzero, full)


def largest_remainder(exact: Mapping[str, float], total: int, most: Mapping[str, int], least: int = 1) -> dict[str, int]:
    """Whole numbers near ``exact`` that add up to ``total``, each between ``least`` and its own ``most``.

    Raises ValueError if the bounds do not allow that.
    """
    if not least * len(most) <= total <= sum(most.values()):
        raise ValueError(
            f"{total:,} weights cannot be distributed over {len(most)} layers of {sum(most.values()):,} weights in all"
        )
    counts = {name: min(max(int(value), least), most[name]) for name, value in exact.items()}
    missing = total - sum(counts.values())
    while missing:
        up = missing > 0
        open_ = [name for name in counts if (counts[name] < most[name] if up else counts[name] > least)]
        order = sorted(open_, key=lambda name: exact[name] - counts[name], reverse=up)
        for name in order[: abs(missing)]:
            counts[name] += 1 if up else -1
        missing = total - sum(counts.values())
    return counts


def top(score: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` highest scores."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[score.flatten().topk(count).indices] = True
    return mask.view_as(score)


def top_global(scores: Mapping[str, Tensor], nonzero: int) -> dict[str, Tensor]:
    """Masks of the ``nonzero`` highest scores of all layers together; a layer that would be empty keeps its best weight.

    Names such layers on stderr. Raises ValueError if a score is NaN.
    """
    flat = torch.cat([score.detach().flatten() for score in scores.values()])
    if flat.isnan().any():
        raise ValueError("scores are NaN: the network's loss or gradient is not finite")
    numel = [score.numel() for score in scores.values()]
    emptied = [name for name, part in zip(scores, top(flat, nonzero).split(numel), strict=True) if not part.any()]
    if emptied:
        print(f"layers that would be empty keep their best weight: {', '.join(emptied)}", file=sys.stderr)
        for part in flat.split(numel):  # of every layer: otherwise, making room for one could empty another
            part[part.argmax()] = torch.inf
    masks = top(flat, nonzero).split(numel)
    return {name: mask.view_as(score) for (name, score), mask in zip(scores.items(), masks, strict=True)}


def random_subset(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mask of ``count`` places drawn uniformly from the mask ``candidates``."""
    places = candidates.flatten().nonzero()[:, 0]
    drawn = places[torch.randperm(len(places), generator=generator, device=places.device)[:count]]
    mask = torch.zeros(candidates.numel(), dtype=torch.bool, device=candidates.device)
    mask[drawn] = True
    return mask.view_as(candidates)
