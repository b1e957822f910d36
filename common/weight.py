"""The ``weight`` of a factorized layer, for code that expects layers to have one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .linalg import outside_autocast


class Product(Protocol):
    """A factorized layer, or anything else whose weight is composed of factors."""

    def factors(self) -> tuple[Tensor, ...]: ...

    def compose(self, factors: Sequence[Tensor]) -> Tensor: ...


class ComposedWeight(Tensor):
    """The product of a layer's factors, composed when it is first used in a computation.

    Shape, dtype and device are known without composing. Autograd treats it as the product. Each read of ``layer.weight``
    composes it at most once. :meth:`detach` returns it as an ordinary tensor.

    Changing this tensor, its ``.data`` or a view of it in place raises AttributeError, because that would change the product
    and not the factors. Computing with it after the factors have changed raises RuntimeError.
    """

    _layer: Product
    _factors: tuple[Tensor, ...]
    _versions: list[int]
    _product: Tensor | None

    @classmethod
    def of(cls, layer: Product, shape: torch.Size) -> Tensor:
        """The weight of a layer, given its shape."""
        return _Composed.apply(layer, shape, *layer.factors())

    @classmethod
    def _make(
        cls, layer: Product, factors: tuple[Tensor, ...], shape: torch.Size, product: Tensor | None = None
    ) -> ComposedWeight:
        """A tensor of this shape without storage. Its values are those of ``product``, which is composed later if None."""
        like = factors[0] if product is None else product
        strides = torch.empty(shape, device="meta").stride() if product is None else product.stride()
        made = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=like.dtype, device=like.device)
        made._layer, made._factors, made._product = layer, factors, product
        made._versions = list(map(_version, factors))
        return made

    def composed(self) -> Tensor:
        """The product, as an ordinary tensor outside of the autograd graph."""
        if self._product is None:
            if list(map(_version, self._factors)) != self._versions:
                raise RuntimeError(f"the factors of {_named(self)} changed after it was read: read it again")
            with torch.no_grad(), outside_autocast(self.device):
                self._product = self._layer.compose(self._factors).contiguous()
        return self._product

    def detach(self) -> Tensor:
        return self.composed().detach()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "requires_grad"):
            _refuse(self, f"setting {name}")
        super().__setattr__(name, value)

    def requires_grad_(self, mode: bool = True) -> NoReturn:
        _refuse(self, "requires_grad_")

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        _refuse(self, "setting entries")

    # Operations that torch does not support for such a subclass.

    def numpy(self, *, force: bool = False) -> Any:
        if self.requires_grad and not force:
            raise RuntimeError("cannot call numpy() on a weight that requires grad: use weight.detach().numpy()")
        return self.composed().numpy(force=force)

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy().astype(dtype) if dtype is not None else self.numpy()

    def tolist(self) -> Any:
        return self.composed().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self.composed())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.composed().clone()

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.composed().__reduce_ex__(proto)

    __torch_function__ = torch._C._disabled_torch_function_impl  # ty: ignore[incompatible-method-override]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # ty: ignore[incompatible-method-override]
        kwargs = kwargs or {}
        given = {spec.name: value for spec, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        own = [each for each in tree_leaves(given) if isinstance(each, ComposedWeight)]
        for spec in func._schema.arguments:
            if spec.alias_info is not None and spec.alias_info.is_write:
                for each in tree_leaves(given.get(spec.name)):
                    if isinstance(each, ComposedWeight):
                        _refuse(each, func._schema.name.removeprefix("aten::"))
        if func is torch.ops.aten.detach.default:  # called by .data
            (weight,) = own
            return cls._make(weight._layer, weight._factors, weight.shape, weight._product)
        result = func(*tree_map(_composed, args), **tree_map(_composed, kwargs))
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        return tree_map(lambda each: _view(own[0], each), result) if is_view else result


class _Composed(torch.autograd.Function):
    """Makes a :class:`ComposedWeight`, which autograd treats as a function of the factors."""

    @staticmethod
    def forward(ctx: Any, layer: Product, shape: torch.Size, *factors: Tensor) -> ComposedWeight:
        ctx.layer = layer
        ctx.save_for_backward(*factors)
        return ComposedWeight._make(layer, factors, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        trained = [factor for factor, needed in zip(factors, wanted, strict=True) if needed]
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            product = ctx.layer.compose(factors)
        found = iter(torch.autograd.grad(product, trained, grads[0], create_graph=twice))
        return None, None, *(next(found) if needed else None for needed in wanted)


def _refuse(weight: ComposedWeight, name: str) -> NoReturn:
    raise AttributeError(
        f"{_named(weight)} is the product of its factors, and {name} would not change them: change the "
        "factors (set_factors, reset_parameters), or densify_ the model first"
    )


def _named(weight: ComposedWeight) -> str:
    return getattr(weight._layer, "weight_name", None) or f"{type(weight._layer).__name__}.weight"


def _view(weight: ComposedWeight, view: Any) -> Any:
    """A view of a weight's product, which also cannot be changed in place."""
    return ComposedWeight._make(weight._layer, weight._factors, view.shape, view) if isinstance(view, Tensor) else view


def _version(factor: Tensor) -> int:
    """The number of times a factor was changed in place. It is 0 for inference tensors, which do not count changes."""
    return 0 if factor.is_inference() else factor._version


def _composed(value: Any) -> Any:
    return value.composed() if isinstance(value, ComposedWeight) else value
