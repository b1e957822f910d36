"""The weight that a factorized layer shows to code which looks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from .layers import Factorized

_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_sparse", "is_meta",
                 "is_quantized", "is_nested", "is_mps", "is_xpu", "is_mkldnn", "itemsize", "nbytes")
} | {
    getattr(Tensor, name)
    for name in ("size", "dim", "numel", "nelement", "ndimension", "element_size", "is_floating_point", "is_complex",
                 "get_device", "__len__", "__hash__")
}  # fmt: skip
_DETACHED = {Tensor.detach, *(getattr(Tensor, name).__get__ for name in ("data",))}


class ComposedWeight(Tensor):
    """The product of a layer's factors, composed once something computes with it.

    Shape, dtype and device are known without composing. What computes with it gets the product, differentiable with respect
    to the factors. A change in place would change the product and not the factors: it raises AttributeError.
    """

    _layer: Factorized
    _detached: bool

    @classmethod
    def of(cls, layer: Factorized, shape: torch.Size, *, detached: bool = False) -> ComposedWeight:
        """The weight of a layer, whose shape is known; ``detached`` from what autograd records."""
        factors = layer.factors()
        trained = not detached and any(factor.requires_grad for factor in factors)
        options: dict[str, Any] = {"dtype": factors[0].dtype, "device": factors[0].device, "requires_grad": trained}
        made = Tensor._make_wrapper_subclass(cls, shape, **options)
        made._layer, made._detached = layer, detached
        return made

    def composed(self) -> Tensor:
        """The product, as an ordinary tensor."""
        weight = self._layer.to_dense()
        return weight.detach() if self._detached else weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _DETACHED:
            weight = args[0]
            return cls.of(weight._layer, weight.shape, detached=True)
        name = getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__set__", "__setitem__", "__delete__")
        in_place = in_place or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
        changed = [*args, *kwargs.values()][:1] if in_place else tree_leaves(kwargs.get("out"))
        if any(isinstance(each, ComposedWeight) for each in changed):
            layer = next(each for each in changed if isinstance(each, ComposedWeight))._layer
            raise AttributeError(
                f"{type(layer).__name__}.weight is the product of its factors, and {name} would not change them: change the "
                "factors (set_factors, reset_parameters), or densify_ the model first"
            )
        return func(*tree_map(_composed, args), **tree_map(_composed, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # ty: ignore[incompatible-method-override]
        return func(*tree_map(_composed, args), **tree_map(_composed, kwargs or {}))


def _composed(value: Any) -> Any:
    return value.composed() if isinstance(value, ComposedWeight) else value
