"""Detect optimizers made before surgery, which still hold the replaced weights and would train nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

_replaced = WeakIdKeyDictionary()  # Parameter -> its name; an entry goes when nothing else holds its Parameter


def remember(parameters: Mapping[str, nn.Parameter]) -> None:
    """Record Parameters that are no longer in their model, by name. An optimizer that holds them raises at its next step.

    Their gradients are dropped, so that one of them has a gradient at that step only if something else computes it.
    """
    _watch()
    for name, parameter in parameters.items():
        parameter.grad = None
        _replaced[parameter] = name


@cache
def _watch() -> None:
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError if the optimizer would train nothing. Closures are skipped: their gradients come during the step."""
    if not _replaced or any(args[1:]) or kwargs.get("closure"):  # args[0] is the optimizer
        return
    held = [p for group in optimizer.param_groups for p in group["params"] if p in _replaced]
    if held and all(parameter.grad is None for parameter in held):  # one with a gradient is in use elsewhere on purpose
        raise ValueError(
            f"this {type(optimizer).__name__} holds {len(held)} Parameters, such as {_replaced[held[0]]!r}, that were replaced "
            "in their model after it was made: make it after factorize_, load_factorized_ or densify_"
        )
