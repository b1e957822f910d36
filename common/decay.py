"""Frobenius decay: the penalty coef/2 ||U V^T||_F^2 on the product, in place of weight decay on the factors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import linalg
from .layers import Factorized


@dataclass(frozen=True)
class FactorPair:
    """Two existing Parameters that act as the factors of one product, such as query and key of attention.

    ``view(u, vt)`` returns the same memory, viewed as batched factors (heads, m, r) and (heads, r, n). It is applied to
    the Parameters and to their gradients, so it must return views and not copies. Both Parameters may be the same packed
    tensor, from which the view takes two slices. With ``q`` and ``k`` of shape (heads * r, d), for instance::

        FactorPair("attention.qk", q, k, lambda q, k: (q.view(heads, -1, d).mT, k.view(heads, -1, d)))
    """

    name: str
    u: nn.Parameter
    vt: nn.Parameter
    view: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def factors(self) -> tuple[Tensor, Tensor]:
        """The batched factors, as views of the Parameters."""
        return self.view(self.u, self.vt)

    def map_factors(self, function: Callable[[nn.Parameter], Tensor]) -> tuple[Tensor, Tensor]:
        """Apply a function, such as one that returns the gradient, to both Parameters, and view the results as the factors."""
        return self.view(function(self.u), function(self.vt))

    def squared_norm(self) -> Tensor:
        """||U V^T||_F^2, summed over the batch, in at least float32; differentiable."""
        return linalg.squared_norm(linalg.at_least_float32(self.factors()))

    def frobenius_grad_products(self) -> list[tuple[Tensor, ...]]:
        """Gradients of 1/2 ||U V^T||_F^2 in at least float32, each as two matrices to multiply."""
        return linalg.frobenius_grad_products(linalg.at_least_float32(self.factors()))

    def __post_init__(self) -> None:
        u, vt = self.factors()
        for given, viewed in ((self.u, u), (self.vt, vt)):
            if viewed.untyped_storage().data_ptr() != given.untyped_storage().data_ptr():
                raise ValueError(
                    f"the view of factor pair {self.name!r} copies its Parameters: use only view, unflatten, mT or slices"
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


class _Stack:
    """Layers whose chains have equal shapes, as one batched product of their factors. On a GPU this saves launches."""

    def __init__(self, layers: Sequence[Factorized]) -> None:
        self.chains = [layer.chain() for layer in layers]

    def factors(self) -> list[Tensor]:
        """The batched factors, (layers, rows, columns) each, in at least float32; copies."""
        return [torch.stack(linalg.at_least_float32(column)) for column in zip(*self.chains, strict=True)]

    def map_factors(self, function: Callable[[nn.Parameter], Tensor]) -> list[tuple[Tensor, ...]]:
        """Apply a function to every Parameter. The result has a tuple for each factor, with an element for each layer."""
        return [tuple(map(function, column)) for column in zip(*self.chains, strict=True)]

    def squared_norm(self) -> Tensor:
        return linalg.squared_norm(self.factors())

    def frobenius_grad_products(self) -> list[tuple[Tensor, ...]]:
        return linalg.frobenius_grad_products(self.factors())


class FrobeniusDecay:
    """Adds the gradient of coef/2 ||W||_F^2 to the gradients of the factors of every W (paper, section 3.2).

    Covers the factors of every :class:`Factorized` layer of the model, unless ``layers`` is false, and the Parameters of
    ``pairs``. Call :meth:`step` after backward (and after unscaling, under AMP) and before gradient clipping and the
    optimizer. It computes outside autocast and, for matrices, in at least float32. Factors that do not require gradients stay
    unchanged. A covered Parameter without a gradient receives one, as if the penalty were part of the loss. Layers with tied
    weights share their factors, so their weight decays once.

    With ``decoupled`` the gradient, times the learning rate given to :meth:`step`, is subtracted from the weights instead of
    added to ``.grad``, as in AdamW's weight decay. If the gradient of any Parameter of the model is not finite, nothing is
    applied, because a GradScaler then skips the optimizer's step. An optimizer that includes the decay in its own update calls
    :meth:`add_to` instead, as :class:`Lamb` does.

    Create it when the model has its final Parameters: after ``load_state_dict(..., assign=True)``, ``to_empty`` and
    ``fully_shard``, and before the optimizer. After a covered layer or Parameter is replaced, a step raises RuntimeError,
    because neither the decay nor the optimizer would reach the replacement.

    Raises ValueError if the coefficient is negative or not finite, or if there is nothing to decay.
    """

    def __init__(
        self,
        model: nn.Module,
        coef: float,
        *,
        pairs: Sequence[FactorPair] = (),
        layers: bool = True,
        decoupled: bool = False,
    ) -> None:
        if not math.isfinite(coef) or coef < 0:
            raise ValueError(f"the Frobenius decay coefficient must be finite and not negative, got {coef}")
        self.coef, self.decoupled, self.pairs = coef, decoupled, tuple(pairs)
        self._model = model
        found = [module for module in model.modules() if isinstance(module, Factorized) and layers]
        self._layers = list({tuple(map(id, layer.factors())): layer for layer in reversed(found)}.values())[::-1]
        self._factors = [(layer, layer.factors()) for layer in self._layers]
        self._places = list(_places(model, found, self.parameters()))
        if not self._layers and not self.pairs:
            raise ValueError(f"nothing to decay: {type(model).__name__} has no factorized layer and no factor pair was given")

    def parameters(self) -> list[nn.Parameter]:
        """The covered Parameters, each once."""
        layers = (factor for layer in self._layers for factor in layer.factors())
        paired = (factor for pair in self.pairs for factor in (pair.u, pair.vt))
        return list({id(factor): factor for factor in (*layers, *paired)}.values())

    def penalty(self) -> Tensor:
        """coef/2 times the sum of ||W||_F^2: a scalar, differentiable, for a loss or a log. Computed outside autocast."""
        device = self.parameters()[0].device
        with linalg.outside_autocast(device):
            alike, others = _grouped(self._layers)
            products = [*self.pairs, *map(_Stack, alike), *others]
            return self.coef / 2 * torch.stack([product.squared_norm().to(device) for product in products]).sum()

    @torch.no_grad()
    def step(self, lr: float | Tensor | None = None) -> None:
        """Add the decay to the gradients or, decoupled, subtract lr (a number or 0-d tensor) times it from the weights."""
        if self.decoupled == (lr is None):
            raise ValueError(
                "decoupled decay needs step(lr)" if self.decoupled else "decay that is not decoupled takes no lr: call step()"
            )
        self._step(self._layers, lr)

    @torch.no_grad()
    def add_to(self, updates: Mapping[nn.Parameter, Tensor]) -> None:
        """Add the decay to an optimizer's updates instead of to gradients. Each update has the shape of its Parameter.

        Covered Parameters without an update are skipped. Raises ValueError for decoupled decay.
        """
        if self.decoupled:
            raise ValueError("decoupled decay cannot be added to updates: call step(lr), which applies it to the weights")
        self._step(self._layers, None, updates)

    @torch.no_grad()
    def step_without(self, layers: Iterable[Factorized]) -> None:
        """Add the decay to the gradients, except for the given layers, which :class:`Composition` has already decayed."""
        done = set(layers)
        self._step([layer for layer in self._layers if layer not in done], None)

    def check(self) -> None:
        """Raise RuntimeError, naming it, if a covered layer or Parameter is no longer in its place in the model."""
        moved = next((name for holder, key, held, name in self._places if holder.get(key) is not held), None)
        if moved is None:
            return
        here = {*map(id, self._model.modules()), *map(id, self._model.parameters())}
        same = [now is then for layer, factors in self._factors for now, then in zip(layer.factors(), factors, strict=True)]
        if not all(same) or not all(id(each) in here for each in (*self._layers, *self.parameters())):
            raise RuntimeError(
                f"{moved} was replaced after this FrobeniusDecay was created, so its decay would not reach the replacement: "
                "create the decay and the optimizer after the call that replaced it (load_state_dict with assign, to_empty, "
                "fully_shard, parametrizations, pruning, densify_)"
            )
        self._places = list(_places(self._model, self._layers, self.parameters()))  # moved into wrappers

    def covers(self, layer: Factorized) -> bool:
        """Whether the decay covers the layer."""
        return any(layer is covered for covered in self._layers)

    def _step(
        self,
        layers: Sequence[Factorized],
        lr: float | Tensor | None,
        given: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        self.check()
        if self.coef == 0 or not (layers or self.pairs):
            return
        device = self.parameters()[0].device
        in_place = device.type == "cpu" and not self.decoupled
        updates = _Updates(self.coef if lr is None else -lr * self.coef, in_place=in_place)
        with linalg.outside_autocast(device):
            for product in self._products(layers, alone=in_place):
                targets = product.map_factors(lambda parameter: self._target(parameter, given))
                for target, gradient in zip(targets, product.frobenius_grad_products(), strict=True):
                    updates.add(target, gradient)  # of W = U V^T: coef U V^T V to the gradient of U, coef V U^T U to that of V
        updates.apply(self._finite() if self.decoupled else None)

    def _finite(self) -> Tensor:
        """Whether all gradients of the model are finite; a scalar on their device."""
        device = self.parameters()[0].device
        grads = [_values(each.grad) for each in self._model.parameters() if each.grad is not None]
        grads = [grad for grad in grads if grad.numel()]
        if not grads:
            return torch.ones((), dtype=torch.bool, device=device)
        if device.type == "cpu":  # where norms of infinite order are slow
            return torch.stack([torch.stack(grad.aminmax()).isfinite().all() for grad in grads]).all()
        return torch.stack([norm.to(device) for norm in torch._foreach_norm(grads, float("inf"))]).isfinite().all()

    def _products(self, layers: Sequence[Factorized], *, alone: bool) -> Iterator[Factorized | _Stack | FactorPair]:
        """The products to decay. Layers of equal shapes form one batch or, if ``alone`` and in full precision, come singly."""
        alike, others = _grouped(layers)
        for group in alike:
            full = group[0].chain()[0].dtype in (torch.float32, torch.float64)
            yield from group if alone and full else [_Stack(group)]
        yield from others
        yield from self.pairs

    def _target(self, parameter: nn.Parameter, given: Mapping[nn.Parameter, Tensor] | None) -> Tensor:
        """The tensor that receives the decay of a Parameter: its update in ``given``, its gradient or, decoupled, itself.

        For a frozen Parameter, or one that is missing in ``given``, it is a scratch tensor.
        """
        if not parameter.requires_grad or (given is not None and parameter not in given):
            return torch.empty_like(parameter)
        if given is not None:
            return given[parameter]
        if self.decoupled:
            return parameter
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad


def _values(grad: Tensor) -> Tensor:
    """The entries of a gradient as real numbers; those that are stored, if it is sparse."""
    stored = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad
    return torch.view_as_real(stored) if stored.is_complex() else stored


def _grouped(layers: Iterable[Factorized]) -> tuple[list[list[Factorized]], list[Factorized]]:
    """Groups of layers whose chains have equal shapes, device and dtype at present, and the layers without a chain."""
    alike: dict[Any, list[Factorized]] = {}
    others = []
    for layer in layers:
        if chain := layer.chain():
            alike.setdefault((chain[0].device, chain[0].dtype, *(factor.shape for factor in chain)), []).append(layer)
        else:
            others.append(layer)
    return list(alike.values()), others


class _Updates:
    """Computes ``target += scale * gradient``, with each gradient given as a product of matrices.

    With ``in_place``, for a CPU, a product of two matrices is added to its target immediately, which saves copies. Everything
    else waits for :meth:`apply`, which adds it in few launches.
    """

    def __init__(self, scale: float | Tensor, *, in_place: bool) -> None:
        self.scale, self.in_place = scale, in_place
        self.targets: list[Tensor] = []
        self.updates: list[Tensor] = []

    def add(self, target: Tensor | tuple[Tensor, ...], gradient: tuple[Tensor, ...]) -> None:
        """Add a gradient to a target of its shape, or a batch of gradients to a tuple of targets."""
        alone = self.in_place and isinstance(target, Tensor) and target.ndim == len(gradient) == 2
        if alone and not isinstance(self.scale, Tensor):
            target.addmm_(*gradient, alpha=self.scale)
            return
        scaled = linalg.compose(gradient) * self.scale  # scaled before the cast: half precision would overflow
        targets, parts = ((target,), (scaled,)) if isinstance(target, Tensor) else (target, scaled.unbind())
        self.targets += targets
        self.updates += [part.to(each.dtype) for each, part in zip(targets, parts, strict=True)]

    def apply(self, wanted: Tensor | None) -> None:
        """Add the waiting updates, unless ``wanted`` is given and false."""
        if wanted is not None:
            self.updates = [torch.where(wanted.to(update.device), update, 0) for update in self.updates]
        if self.targets:
            torch._foreach_add_(self.targets, self.updates)


def _places(
    model: nn.Module, layers: Sequence[Factorized], parameters: Sequence[nn.Parameter]
) -> Iterator[tuple[Mapping[str, Any], str, Any, str]]:
    """The places in the model of layers, Parameters, and modules around them: dictionary, key, value, and qualified name."""
    wanted = {id(each) for each in (*layers, *parameters)}
    for name, module in model.named_modules():
        for holder in (module._modules, module._parameters):
            for key, held in holder.items():
                around = isinstance(held, nn.Module) and any(id(each) in wanted for each in held.parameters())
                if id(held) in wanted or around:
                    yield holder, key, held, f"{name}.{key}" if name else key


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    decay: FrobeniusDecay | None = None,
    factor_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups in which Parameters covered by ``decay`` get no weight decay, and all others get ``weight_decay``.

    ``factor_weight_decay`` is the weight decay of the covered Parameters, instead of 0. Without ``decay``, it applies to the
    factors of every :class:`Factorized` layer, which otherwise get ``weight_decay`` like the rest. Together the groups hold
    every Parameter of the model once. Factors are identified by the type of their module and never by name. Each group has a
    ``name``: "rest" or "factors".

    Warns, unless ``factor_weight_decay`` is given, if the pairs of ``decay`` cover only a part of a Parameter, such as the
    values in a packed projection: the rest of it gets no decay. Raises ValueError if a weight decay is negative or not finite,
    or if ``decay`` covers a Parameter that the model does not have. Raises RuntimeError if a covered Parameter was replaced,
    because its replacement would get neither kind of decay.
    """
    for value in (weight_decay, factor_weight_decay or 0.0):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"weight decay must be finite and not negative, got {value}")
    if decay is not None:
        decay.check()
        covered = decay.parameters()
    elif factor_weight_decay is not None:
        covered = [factor for module in model.modules() if isinstance(module, Factorized) for factor in module.factors()]
    else:
        covered = []
    ids = {id(parameter) for parameter in covered}
    silent = decay is None or not weight_decay or factor_weight_decay is not None
    if decay is not None and not silent and (partly := _partly_covered(model, decay)):
        warnings.warn(
            f"Frobenius decay covers only a part of {len(partly)} Parameters, such as {partly[0]!r}. The rest of them gets no "
            "decay, since weight decay applies to a whole Parameter; factor_weight_decay gives these some",
            stacklevel=2,
        )
    parameters = list(model.parameters())
    strange = len(ids - {id(parameter) for parameter in parameters})
    if strange:
        raise ValueError(f"{strange} of the {len(ids)} Parameters that the decay covers are not in this {type(model).__name__}")
    groups = [
        {"params": [p for p in parameters if id(p) not in ids], "weight_decay": weight_decay, "name": "rest"},
        {"params": [p for p in parameters if id(p) in ids], "weight_decay": factor_weight_decay or 0.0, "name": "factors"},
    ]
    return [group for group in groups if group["params"]]


def _partly_covered(model: nn.Module, decay: FrobeniusDecay) -> list[str]:
    """Names of the Parameters of which the pairs of ``decay`` cover some entries and not others."""
    covered = {
        id(each): torch.zeros_like(each, dtype=torch.bool, device="cpu") for pair in decay.pairs for each in (pair.u, pair.vt)
    }
    for pair in decay.pairs:
        for view in pair.map_factors(lambda parameter: covered[id(parameter)]):
            view.fill_(True)
    return [name for name, each in model.named_parameters() if id(each) in covered and not covered[id(each)].all()]
