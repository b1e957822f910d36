"""Compose the weights of many factorized layers at once: one batched product for each group of layers with equal shapes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import linalg
from .decay import FrobeniusDecay
from .layers import Factorized


class _Separate(torch.autograd.Function):
    """Split the weights (layers, ...) of a group by layer, in the precision and memory layout that forward passes use.

    Backward adds ``coef * scale * W`` to the gradient of every W. By the chain rule this is Frobenius decay of the factors:
    with a scale of 1, W = U V^T adds ``coef * W V`` to the gradient of U and ``coef * U^T W`` to that of V^T. The sum is
    computed in the precision of W, which is at least float32, because in bfloat16 rounding would lose the decay.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, dtype: torch.dtype, group: _Group, scale: Tensor | None) -> tuple[Tensor, ...]:
        ctx.group, ctx.scale = group, scale
        ctx.save_for_backward(weights)
        planar = weights.ndim == 5  # (layers, out, in, kh, kw)
        used = _channels_last(weights, planar)
        used = torch.empty(used.shape, dtype=dtype, device=used.device).copy_(used)  # one launch for the cast and the layout
        return _channels_first(used, planar).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        group: _Group = ctx.group
        planar = weights.ndim == 5
        stacked = _channels_first(torch.stack([_channels_last(grad, planar) for grad in grads]), planar)
        total = torch.empty_like(weights)
        if not group.coef:
            total.copy_(stacked)
        elif ctx.scale is None:
            torch.add(stacked, weights, alpha=group.coef, out=total)
        else:
            torch.addcmul(stacked, weights, ctx.scale, value=group.coef, out=total)
        group.decayed = group.decays
        return total, None, None, None


def _channels_last(weights: Tensor, planar: bool) -> Tensor:
    """A view of kernels of two dimensions (..., out, in, kh, kw) as (..., out, kh, kw, in); other weights unchanged."""
    return weights.movedim(-3, -1) if planar else weights


def _channels_first(weights: Tensor, planar: bool) -> Tensor:
    """Inverse of :func:`_channels_last`."""
    return weights.movedim(-1, -3) if planar else weights


class _Group:
    """Layers of one kind whose factors have equal shapes.

    decay:    the Frobenius decay that is added to the gradients of their weights, or None.
    coef:     its coefficient when the weights were composed.
    decays:   whether the decay is added to the gradients of the weights composed last.
    decayed:  whether the decay has been added to gradients since the last :meth:`Composition.decay_rest`.
    """

    def __init__(self, layers: list[Factorized], decay: FrobeniusDecay | None) -> None:
        self.layers, self.decay, self.coef, self.decays, self.decayed = layers, decay, 0.0, False, False

    def compose(self, dtype: torch.dtype | None, scale: Tensor | None, decays: bool) -> None:
        """Give each layer its weight, in ``dtype`` (None: that of its factors)."""
        columns = list(zip(*(layer.factors() for layer in self.layers), strict=True))
        own = columns[0][0].dtype
        if dtype is None or own == torch.float64:  # autocast leaves float64 unchanged
            dtype = own
        with linalg.outside_autocast(columns[0][0].device):
            stacked = [torch.stack(linalg.at_least_float32(column)) for column in columns]
            weights = self.layers[0].compose(stacked)
        self.decays = decays and self.decay is not None
        self.coef = self.decay.coef if self.decays and self.decay is not None else 0.0
        for layer, weight in zip(self.layers, _Separate.apply(weights, dtype, self, scale), strict=True):
            layer._composed = weight


class Composition:
    """Composes the weights of a model's layers in groups of equal shapes. On a GPU this saves most of their launches.

    It covers the layers whose ``contraction`` is "composed" when it is created. Their forward passes compute the same
    functions with or without it. Frobenius decay of these layers is added to the gradients of their weights. This costs one
    addition per group, whereas :meth:`FrobeniusDecay.step` computes products of factors; the gradients of the factors are the
    same. Decay must be added in exactly one backward pass per optimizer step. Call :meth:`decay_rest` instead of the decay's
    ``step``::

        composition = Composition(model, decay)
        for images, labels in batches:
            optimizer.zero_grad()
            with composition.active():
                loss(model(images), labels).backward()
            composition.decay_rest()
            optimizer.step()

    A class derived from :class:`FrobeniusDecay` may penalize something else, so it is not added to the gradients of weights:
    :meth:`decay_rest` calls its ``step``.

    Raises ValueError for decoupled decay, which does not act through gradients.
    """

    def __init__(self, model: nn.Module, decay: FrobeniusDecay | None = None) -> None:
        if decay is not None and decay.decoupled:
            raise ValueError("a composition adds decay to gradients, but this decay is decoupled: call its step(lr) instead")
        self.decay = decay
        alike: dict[Any, list[Factorized]] = {}
        for layer in model.modules():
            if isinstance(layer, Factorized) and layer.contraction == "composed":
                alike.setdefault(_kind(layer, decay), []).append(layer)
        on_weights = decay if type(decay) is FrobeniusDecay else None
        self._groups = [_Group(layers, on_weights if covered else None) for (covered, *_), layers in alike.items()]

    @contextmanager
    def active(self, dtype: torch.dtype | None = None, scale: Tensor | None = None, *, decays: bool = True) -> Generator[None]:
        """Compose the weights now. Forward passes use them until the end of the block, which must include the backward pass.

        dtype:  of the weights: the dtype in which autocast computes (None: that of the factors). In half precision on a GPU,
                float32 products run in TF32 within the block: its mantissa of 10 bits is at least as precise as the weights.
        scale:  the factor by which the loss is multiplied (a scalar on the device); the decay is multiplied by it, too.
        decays: whether the decay is added to the gradients. If the gradients of several backward passes are summed before the
                optimizer's step, set it for only one of them.

        Raises RuntimeError if decay has been added to gradients and :meth:`decay_rest` has not been called since.
        """
        if any(group.decayed for group in self._groups):
            raise RuntimeError(
                "a composition decays once a step: call decay_rest() after the backward pass, then the optimizer's step()"
            )
        on_gpu = any(group.layers[0].factors()[0].is_cuda for group in self._groups)
        try:
            with _tf32() if on_gpu and dtype in (torch.float16, torch.bfloat16) else nullcontext():
                for group in self._groups:
                    group.compose(dtype, scale, decays)
                yield
        finally:
            for group in self._groups:
                for layer in group.layers:
                    layer._composed = None

    def decay_rest(self) -> None:
        """Apply decay where backward passes have not: to layers not composed or not used, and to factor pairs."""
        done = [layer for group in self._groups if group.decayed for layer in group.layers]
        for group in self._groups:
            group.decayed = False
        if self.decay is not None and done:
            self.decay.step_without(done)
        elif self.decay is not None:
            self.decay.step()


@contextmanager
def _tf32() -> Generator[None]:
    """Let float32 matrix products run in TF32, unless the user has chosen a precision through torch's newer settings."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised if the newer settings are in use; the two do not mix
        yield
        return
    try:
        torch.set_float32_matmul_precision("high" if before == "highest" else before)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _kind(layer: Factorized, decay: FrobeniusDecay | None) -> Any:
    """The properties that the layers of a group share. The first is whether they decay."""
    factors = layer.factors()
    covered = decay is not None and decay.covers(layer)
    shapes = tuple(factor.shape for factor in factors), layer.weight_shape()
    return covered, type(layer), shapes, factors[0].dtype, factors[0].device
