"""LAMB with Frobenius decay. The length of its step for each Parameter is the learning rate times the Parameter's norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn

from .decay import FrobeniusDecay


class Lamb(torch.optim.Optimizer):
    """LAMB with phi(z) = z (You et al., "Large Batch Optimization for Deep Learning", ICLR 2020, Algorithm 2).

    For every Parameter p with a gradient, a step computes u = m / (sqrt(v) + eps) + weight_decay * p, where m and v are the
    bias-corrected moments of Adam, and subtracts lr * (||p|| / ||u||) * u from p. If either norm is 0, the trust ratio
    ||p|| / ||u|| is 1. Parameters without weight decay have a trust ratio, too.

    params:        Parameters or groups. The trust ratio of a group with ``adapt=False`` is 1, which suits biases and norms.
    lr:            learning rate, a number or a 0-d tensor on the Parameters' device.
    betas, eps, weight_decay: as in AdamW.
    decay:         Frobenius decay of coefficient coef ("FLAMBe"): coef U (V^T V) is added to the u of a factor U of U V^T,
                   and likewise for V, before the trust ratio. Do not also call its ``step``, and exclude the factors that it
                   covers from weight decay (:func:`param_groups`).

    A step can be recorded as a CUDA graph if lr is a tensor, because step counts are tensors, too. Raises ValueError if
    hyper-parameters of any group are out of range, if Parameters are in half precision, which cannot count steps, or if decay
    is decoupled, because it would act after the trust ratio.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decay: FrobeniusDecay | None = None,
    ) -> None:
        if decay is not None and decay.decoupled:
            raise ValueError(
                "LAMB adds decay to its update before the trust ratio, but this decay is decoupled: "
                "create it with decoupled=False"
            )
        own = decay is not None and type(decay).step is not FrobeniusDecay.step
        if own and type(decay).add_to is FrobeniusDecay.add_to:
            name = type(decay).__name__
            raise ValueError(f"LAMB adds decay through its add_to, but {name} overrides only step: override add_to, too")
        self.decay = decay
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "decay": self.decay}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of Parameters. Raises ValueError if hyper-parameters are out of range or Parameters in half precision."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        half = next((p.dtype for p in self.param_groups[-1]["params"] if p.dtype.itemsize < 4), None)
        if half is not None:
            del self.param_groups[-1]
            raise ValueError(
                f"LAMB needs Parameters in float32 or float64, got {half}: keep them in float32 and use torch.autocast"
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every Parameter that has a gradient. Calls ``closure`` first, with gradients enabled, and returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [(group, batch) for group in self.param_groups for batch in _alike(group["params"])]
        updates = {p: u for group, batch in batches for p, u in zip(batch, self._updates(group, batch), strict=True)}
        if self.decay is not None:
            self.decay.add_to(updates)
        for group, batch in batches:
            _subtract([*batch], [updates[p] for p in batch], group["lr"], adapt=group["adapt"])
        return loss

    def _updates(self, group: dict[str, Any], batch: list[nn.Parameter]) -> tuple[Tensor, ...]:
        """The u of Parameters of one device and dtype. LAMB multiplies it by the learning rate and the trust ratio."""
        for p in batch:
            if not self.state[p]:
                # Not named "step": load_state_dict moves all state to its Parameter's device except "step".
                self.state[p] = {"steps": p.new_zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        steps, first, second = ([self.state[p][key] for p in batch] for key in ("steps", "exp_avg", "exp_avg_sq"))
        grads = [p.grad for p in batch if p.grad is not None]  # all of them have one
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(torch._foreach_div(second, _bias(beta2, steps)))
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(torch._foreach_div(first, _bias(beta1, steps)), roots)
        if group["weight_decay"]:
            torch._foreach_add_(updates, [*batch], alpha=group["weight_decay"])
        return updates


def _bias(beta: float, steps: list[Tensor]) -> tuple[Tensor, ...]:
    """1 - beta^steps, the divisor of moments. Uses expm1, because 1 - 0.999 has only four correct digits in float32."""
    exponents = torch._foreach_mul(steps, math.log(beta) if beta else -math.inf)
    return torch._foreach_neg(torch._foreach_expm1(exponents))


def _subtract(weights: list[Tensor], updates: list[Tensor], lr: float | Tensor, *, adapt: bool) -> None:
    """p -= lr * u or, with ``adapt``, lr * (||p|| / ||u||) * u."""
    if adapt:
        lengths, update_lengths = (torch.stack(torch._foreach_norm(each)) for each in (weights, updates))
        ratios = (lengths / update_lengths).masked_fill((lengths == 0) | (update_lengths == 0), 1)
        torch._foreach_mul_(updates, (ratios * lr).unbind())
    else:
        torch._foreach_mul_(updates, lr)
    torch._foreach_sub_(weights, updates)


def _alike(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The Parameters that have a gradient, in batches of one device and dtype."""
    batches: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            batches.setdefault((p.device, p.dtype), []).append(p)
    yield from batches.values()


def _check(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if lr.ndim:
            raise ValueError(f"a learning rate given as a tensor must have no dimensions, got shape {tuple(lr.shape)}")
    elif not 0 <= lr < math.inf:
        raise ValueError(f"the learning rate must be finite and not negative, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers from 0 to below 1, got {betas}")
    for name in ("eps", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {group[name]}")
