"""Frobenius decay: the penalty coef/2 ||U V^T||_F^2 on the product, in place of weight decay on the factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common import linalg
from common.layers import Factorized, FactorizedMatrix


@dataclass(frozen=True)
class FactorPair:
    """Two existing Parameters that act as the factors of one product, such as query and key of attention.

    ``view(u, vt)`` returns the same memory, viewed as batched factors (heads, m, r) and (heads, r, n). It is applied to
    the Parameters and to their gradients, so it must return views and not copies. Both Parameters may be one packed
    tensor of which the view takes two slices. With ``q`` and ``k`` of shape (heads * r, d), for instance::

        FactorPair("attention.qk", q, k, lambda q, k: (q.view(heads, -1, d).mT, k.view(heads, -1, d)))
    """

    name: str
    u: nn.Parameter
    vt: nn.Parameter
    view: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.view(self.u, self.vt)

    def __post_init__(self) -> None:
        u, vt = self.factors()
        for given, viewed in ((self.u, u), (self.vt, vt)):
            if viewed.untyped_storage().data_ptr() != given.untyped_storage().data_ptr():
                raise ValueError(
                    f"the view of factor pair {self.name!r} copies its Parameters: use view, unflatten, mT or slices"
                )
        if any(stride == 0 for stride in (*u.stride(), *vt.stride())):
            raise ValueError(
                f"the view of factor pair {self.name!r} repeats memory (expand): decay each group of heads as its own pair"
            )
        if u.ndim != 3 or vt.ndim != 3 or u.shape[0] != vt.shape[0] or u.shape[2] != vt.shape[1]:
            raise ValueError(
                f"the view of factor pair {self.name!r} must give (heads, m, r) and (heads, r, n), "
                f"got {tuple(u.shape)} and {tuple(vt.shape)}"
            )


class FrobeniusDecay:
    """Adds the gradient of coef/2 ||W||_F^2 to the gradients of the factors of every W (paper, section 3.2).

    Covers the factors of every :class:`Factorized` layer of the model and the Parameters of ``pairs``. Call
    :meth:`step` after backward (and after unscaling, under AMP) and before gradient clipping and the optimizer; it
    computes outside autocast and, for matrices, in at least float32. Factors that need no gradient are left alone; a covered
    Parameter without a gradient receives one, as if the penalty had been part of the loss.

    With ``decoupled`` the gradient is not added to ``.grad`` but applied to the weights, times the learning rate given to
    :meth:`step`, as AdamW does with weight decay.

    Raises ValueError for a coefficient that is negative or not finite, or where there is nothing to decay.
    """

    def __init__(self, model: nn.Module, coef: float, *, pairs: Sequence[FactorPair] = (), decoupled: bool = False) -> None:
        if not math.isfinite(coef) or coef < 0:
            raise ValueError(f"the Frobenius decay coefficient must be finite and not negative, got {coef}")
        self.coef, self.decoupled, self.pairs = coef, decoupled, tuple(pairs)
        self._layers = [module for module in model.modules() if isinstance(module, Factorized)]
        if not self._layers and not self.pairs:
            raise ValueError(f"nothing to decay: {type(model).__name__} has no factorized layer and no factor pair was given")
        self._groups: dict[Any, list[tuple[nn.Parameter, ...]]] = {}  # factors of equal shapes share one batched product
        for layer in self._layers:
            if isinstance(layer, FactorizedMatrix):
                key = (layer.u.device, *(factor.shape for factor in layer.factors()))
                self._groups.setdefault(key, []).append(layer.factors())

    @property
    def _device_type(self) -> str:
        factors = self._layers[0].factors() if self._layers else (self.pairs[0].u,)
        return factors[0].device.type

    def parameters(self) -> list[nn.Parameter]:
        """The covered Parameters, each once."""
        layers = (factor for layer in self._layers for factor in layer.factors())
        paired = (factor for pair in self.pairs for factor in (pair.u, pair.vt))
        return list({id(factor): factor for factor in (*layers, *paired)}.values())

    def penalty(self) -> Tensor:
        """coef/2 times the sum of ||W||_F^2: a scalar, differentiable once, for a loss or a log."""
        norms = [linalg.squared_norm(_at_least_float32(pair.factors())) for pair in self.pairs]
        for group in self._groups.values():
            columns = zip(*group, strict=True)
            norms.append(linalg.squared_norm([torch.stack(_at_least_float32(column)) for column in columns]))
        norms += [layer.squared_norm() for layer in self._layers if not isinstance(layer, FactorizedMatrix)]
        return self.coef / 2 * torch.stack(norms).sum()

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """Add the decay to the gradients or, decoupled, subtract lr times the decay from the weights."""
        if self.decoupled == (lr is None):
            raise ValueError(
                "decoupled decay needs step(lr)" if self.decoupled else "lr is for decoupled decay, which this is not"
            )
        if self.coef == 0:
            return
        scale = self.coef if lr is None else -lr * self.coef
        targets: list[Tensor] = []
        updates: list[Tensor] = []

        def collect(factors: Iterable[Tensor], into: Iterable[Tensor], grads: Iterable[Tensor]) -> None:
            for factor, target, grad in zip(factors, into, grads, strict=True):
                if factor.requires_grad:
                    targets.append(target)
                    updates.append(grad.to(target.dtype))

        # Gradients are scaled before they are cast: half precision would overflow. A CPU adds each product into its gradient
        # at once, which saves copies; elsewhere layers of equal shapes are one batch, which saves launches.
        in_place = self._device_type == "cpu" and lr is None
        with torch.autocast(self._device_type, enabled=False):
            for group in self._groups.values():
                if in_place and group[0][0].dtype in (torch.float32, torch.float64):
                    for factors in group:
                        for factor, (left, right) in zip(factors, linalg.frobenius_grad_products(factors), strict=True):
                            if factor.requires_grad:
                                self._target(factor).addmm_(left, right, alpha=scale)
                    continue
                stacked = [torch.stack(_at_least_float32(column)) for column in zip(*group, strict=True)]
                for column, grads in zip(zip(*group, strict=True), linalg.frobenius_grads(stacked), strict=True):
                    collect(column, map(self._target, column), (grads * scale).unbind())
            for layer in self._layers:
                if not isinstance(layer, FactorizedMatrix):
                    grads = [grad * scale for grad in layer.frobenius_grads()]
                    collect(layer.factors(), map(self._target, layer.factors()), grads)
            for pair in self.pairs:
                grads = [grad * scale for grad in linalg.frobenius_grads(_at_least_float32(pair.factors()))]
                collect((pair.u, pair.vt), pair.view(self._target(pair.u), self._target(pair.vt)), grads)
        if targets:
            torch._foreach_add_(targets, updates)

    def _target(self, parameter: nn.Parameter) -> Tensor:
        if self.decoupled:
            return parameter
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
        return parameter if parameter.grad is None else parameter.grad


def _at_least_float32(factors: Iterable[Tensor]) -> list[Tensor]:
    return [factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in factors]


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    decay: FrobeniusDecay | None = None,
    factor_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups: exactly the Parameters that ``decay`` covers get no weight decay, all others ``weight_decay``.

    ``factor_weight_decay`` is the weight decay of those covered Parameters instead of 0 or, without ``decay``, of the
    factors of every :class:`Factorized` layer, which otherwise get ``weight_decay`` like the rest. Groups are disjoint and
    complete, are told apart by module type and never by name, and carry ``name`` ("rest", "factors").

    Raises ValueError for a weight decay that is negative or not finite.
    """
    for value in (weight_decay, factor_weight_decay or 0.0):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"weight decay must be finite and not negative, got {value}")
    if decay is not None:
        covered = decay.parameters()
    elif factor_weight_decay is not None:
        covered = [factor for module in model.modules() if isinstance(module, Factorized) for factor in module.factors()]
    else:
        covered = []
    ids = {id(parameter) for parameter in covered}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) not in ids], "weight_decay": weight_decay, "name": "rest"},
        {"params": [p for p in parameters if id(p) in ids], "weight_decay": factor_weight_decay or 0.0, "name": "factors"},
    ]
    return [group for group in groups if group["params"]]
