"""The kinds of layers that surgery replaces: unrolled weights, factorized forms, and reasons not to replace a layer.

A donor is an ordinary layer that surgery replaces with a factorized one.
"""

from __future__ import annotations

import math
from collections.abc import Set
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import linalg
from .attention import UnpackedMultiheadAttention
from .layers import (
    Contraction,
    Factorized,
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    FactorizedMatrix,
    FactorizedTransposedLinear,
)

RankOf = Literal["released", "min"]


class Refusal(NamedTuple):
    """Why a layer cannot be replaced, and what to do about it."""

    reason: str
    remedy: str = "exclude it with filter_fn"


class Kind:
    """One kind of ordinary layer.

    ``dense``: its class; ``factorized``: the class that replaces it.
    """

    dense: type[nn.Module]
    factorized: type[FactorizedMatrix]

    def includes(self, module: nn.Module) -> bool:
        """Whether a module is of this kind, judged by its class."""
        return isinstance(module, self.dense) and not getattr(module, "transposed", False)

    def refusal(self, module: nn.Module) -> Refusal | None:
        """The reason not to replace a layer that is specific to this kind, or None."""
        return None

    def shape(self, module: Any) -> tuple[int, ...]:
        """Shape of :meth:`unroll`, without unrolling the weight."""
        return tuple(module.weight.shape)

    def unroll(self, module: Any) -> Tensor:
        """The weight as a matrix (rows, columns) or, for a layer with groups, as (groups, rows, columns)."""
        return module.weight.detach()

    def rank_dimension(self, module: nn.Module, rank_of: RankOf) -> int:
        """The dimension by which a rank scale is multiplied."""
        return min(self.shape(module)[-2:])

    def make(self, module: Any, rank: int, depth: int, contraction: Contraction) -> FactorizedMatrix:
        """A factorized layer with the same shape and options. Its factors are not initialized."""
        raise NotImplementedError

    def own_attributes(self) -> set[str]:
        """Names of the attributes that every layer of this kind has."""
        return set(vars(self.example()))

    def example(self) -> nn.Module:
        """An example of a layer of this kind."""
        return self.dense(1, 1, device="meta")

    def _options(self, module: Any, depth: int, contraction: Contraction) -> dict[str, Any]:
        weight = module.weight
        return {"depth": depth, "contraction": contraction, "device": weight.device, "dtype": weight.dtype}


class _Linear(Kind):
    dense, factorized = nn.Linear, FactorizedLinear

    def make(self, module: Any, rank: int, depth: int, contraction: Contraction) -> FactorizedMatrix:
        args = (module.in_features, module.out_features, rank, module.bias is not None)
        return nn.utils.skip_init(FactorizedLinear, *args, **self._options(module, depth, contraction))


class _Embedding(Kind):
    dense, factorized = nn.Embedding, FactorizedEmbedding

    def refusal(self, module: nn.Module) -> Refusal | None:
        for option in ("sparse", "max_norm", "scale_grad_by_freq"):
            if getattr(module, option):
                return Refusal(f"an embedding with {option} is not supported")
        return None

    def make(self, module: Any, rank: int, depth: int, contraction: Contraction) -> FactorizedMatrix:
        args = (module.num_embeddings, module.embedding_dim, rank, module.padding_idx)
        return nn.utils.skip_init(FactorizedEmbedding, *args, **self._options(module, depth, contraction))

    def example(self) -> nn.Module:
        return nn.Embedding(1, 1, _weight=torch.empty(1, 1))  # random initialization on the device "meta" takes seconds


class _Convolution(Kind):
    """A convolution in one or two dimensions."""

    def __init__(self, dense: type[nn.Module], factorized: type[FactorizedMatrix]) -> None:
        self.dense, self.factorized = dense, factorized

    def refusal(self, module: nn.Module) -> Refusal | None:
        if getattr(type(module), "_conv_forward", None) is not getattr(self.dense, "_conv_forward", None):
            return Refusal(f"{type(module).__name__} overrides _conv_forward")
        return None

    def shape(self, module: Any) -> tuple[int, ...]:
        *height, width = module.kernel_size
        height = height[0] if height else 1
        shape = (module.out_channels // module.groups * height, module.in_channels // module.groups * width)
        return shape if module.groups == 1 else (module.groups, *shape)

    def unroll(self, module: Any) -> Tensor:
        return linalg.as_matrix(module.weight.detach()).reshape(self.shape(module))

    def rank_dimension(self, module: nn.Module, rank_of: RankOf) -> int:
        """The number of rows, as in the released code, or the smaller side."""
        rows, columns = self.shape(module)[-2:]
        return rows if rank_of == "released" else min(rows, columns)

    def make(self, module: Any, rank: int, depth: int, contraction: Contraction) -> FactorizedMatrix:
        return nn.utils.skip_init(
            self.factorized,
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            rank,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
            **self._options(module, depth, contraction),
        )

    def example(self) -> nn.Module:
        return self.dense(1, 1, 1, device="meta")


class _TransposedLinear(Kind):
    """transformers' Conv1D: a linear layer with weight (in, out), identified by its class name and attributes."""

    dense, factorized = nn.Module, FactorizedTransposedLinear

    def includes(self, module: nn.Module) -> bool:
        named: Any = next((kind for kind in type(module).__mro__ if kind.__name__ == "Conv1D"), None)
        weight = module._parameters.get("weight")
        if (
            named is None
            or weight is None
            or module._parameters.get("bias") is None
            or type(module).forward is not named.forward
        ):
            return False
        return tuple(weight.shape) == (getattr(module, "nx", None), getattr(module, "nf", None))

    def shape(self, module: Any) -> tuple[int, ...]:
        return tuple(module.weight.shape)[::-1]

    def unroll(self, module: Any) -> Tensor:
        return module.weight.detach().mT

    def make(self, module: Any, rank: int, depth: int, contraction: Contraction) -> FactorizedMatrix:
        options = {"dense_class": type(module), **self._options(module, depth, contraction)}
        return nn.utils.skip_init(FactorizedTransposedLinear, module.nx, module.nf, rank, **options)

    def own_attributes(self) -> set[str]:
        return {*vars(nn.Module()), "nf", "nx"}


_KINDS = (
    _Linear(),
    _Convolution(nn.Conv2d, FactorizedConv2d),
    _Convolution(nn.Conv1d, FactorizedConv1d),
    _Embedding(),
    _TransposedLinear(),
)
_UNSUPPORTED = (nn.modules.conv._ConvNd, nn.EmbeddingBag)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, or None if no kind includes it."""
    return next((kind for kind in _KINDS if kind.includes(module)), None)


def _known(module: nn.Module) -> Kind:
    kind = kind_of(module)
    assert kind is not None
    return kind


def shape(donor: nn.Module) -> tuple[int, ...]:
    """Shape of the unrolled weight, (rows, columns) or (groups, rows, columns)."""
    return _known(donor).shape(donor)


def unroll(donor: nn.Module) -> Tensor:
    """The unrolled weight, with the shape that :func:`shape` returns."""
    return _known(donor).unroll(donor)


def unrolling(donor: nn.Module) -> object:
    """A value to compare: layers with a tied weight can share its factors only if this is equal."""
    return shape(donor), isinstance(_known(donor), _TransposedLinear)


def weight_shape(donor: nn.Module) -> tuple[int, ...]:
    """Shape of the weight as the layer stores it."""
    assert isinstance(donor.weight, Tensor)
    return tuple(donor.weight.shape)


def numel(donor: nn.Module) -> int:
    """Number of entries of the weight."""
    return math.prod(shape(donor))


def rank_dimension(donor: nn.Module, rank_of: RankOf) -> int:
    """The dimension by which a rank scale is multiplied."""
    return _known(donor).rank_dimension(donor, rank_of)


def is_candidate(module: nn.Module) -> bool:
    """Whether a module is a layer with a weight to factorize, supported or not."""
    return isinstance(module, (*_UNSUPPORTED, nn.Linear, nn.Embedding)) or kind_of(module) is not None


def refusal(module: Any) -> Refusal | None:
    """The reason why a layer cannot be replaced, or None."""
    name, kind = type(module).__name__, kind_of(module)
    if kind is None:
        return Refusal(f"{name} is not a Linear, Conv1d, Conv2d, Embedding or MultiheadAttention")
    if kind.dense is not nn.Module and type(module).forward is not kind.dense.forward:
        return Refusal(f"{name} overrides forward")
    if parametrize.is_parametrized(module):
        return Refusal("its weight is parametrized", "remove the parametrization or exclude it with filter_fn")
    if "weight" not in module._parameters:
        remedy = "remove it or exclude it with filter_fn"
        return Refusal("a hook computes its weight (weight_norm, pruning)", remedy)
    weight = module._parameters["weight"]
    if isinstance(weight, nn.UninitializedParameter):
        remedy = "run one batch through the model first or exclude it with filter_fn"
        return Refusal(f"{name} has no weight yet", remedy)
    assert weight is not None
    if not weight.is_floating_point():
        return Refusal(f"its weight is {weight.dtype}, not floating point")
    return altered(module) or _altered_weight(weight) or kind.refusal(module)


# Attributes and hooks that a user or a library added to a layer

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def altered(module: nn.Module) -> Refusal | None:
    """A change to a layer that its replacement could not keep, or None."""
    remedy = "undo that first or exclude it with filter_fn"
    for name in vars(module):
        if callable(getattr(type(module), name, None)):
            return Refusal(f"its {name} is overridden on the instance", remedy)
    if module._compiled_call_impl is not None:
        return Refusal("it was compiled by its method compile()", "compile it afterwards or exclude it with filter_fn")
    if any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        return Refusal("it has state dict hooks, but the names in its state dict will change", remedy)
    return None


def _altered_weight(weight: Tensor) -> Refusal | None:
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return Refusal("its weight has gradient hooks", "remove them first or exclude it with filter_fn")
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        kind = type(weight if type(weight) is not nn.Parameter else weight.data).__name__
        return Refusal(f"its weight is a {kind}", "factorize the model before it is sharded or quantized, or exclude it")
    return None


def carry_over(old: nn.Module, new: nn.Module, own: Set[str], parts: Set[str]) -> None:
    """Give a replacement the hooks of the old layer, and the attributes, buffers, Parameters and modules added to that layer.

    own:    names of the attributes that every layer of the old kind has.
    parts:  names of the Parameters and modules that every layer of the old kind has.

    Handles of hooks that were registered before keep working. Raises ValueError if the replacement already has an attribute of
    the same name.
    """
    added = {name: value for name, value in vars(old).items() if name not in own}
    registers = [
        {name: value for name, value in getattr(old, register).items() if name not in parts}
        for register in ("_parameters", "_buffers", "_modules")
    ]
    for name in (name for names in (added, *registers) for name in names):
        if hasattr(new, name):
            raise ValueError(f"{type(new).__name__} already has an attribute {name!r}: rename that of {type(old).__name__}")
    vars(new).update(added)
    for target, register in zip((new._parameters, new._buffers, new._modules), registers, strict=True):
        target.update(register)
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set
    for name in _HOOKS:
        vars(new)[name] = vars(old)[name]
    new.train(old.training)


@cache
def _own_attributes(kind: Kind) -> frozenset[str]:
    return frozenset(kind.own_attributes())


def skeleton(module: Any, rank: int, depth: int, contraction: Contraction) -> FactorizedMatrix:
    """A factorized layer to replace a donor. Its factors are uninitialized, and its bias is the donor's Parameter."""
    kind = _known(module)
    layer = kind.make(module, rank, depth, contraction)
    for factor in layer.factors():
        factor.requires_grad_(module.weight.requires_grad)
        factor.__dict__.update(module.weight.__dict__)
    if layer.bias is not None:
        layer.bias = module.bias
    carry_over(module, layer, _own_attributes(kind), {"weight", "bias"})
    return layer


def fold(layer: Factorized) -> nn.Module:
    """An ordinary layer to replace a factorized one, with the same function."""
    dense = layer.to_layer()
    if isinstance(layer, FactorizedMatrix):
        dense.weight.__dict__.update(layer.u.__dict__)
        carry_over(layer, dense, layer.own_attributes | {"_composed", "padding_row_is_shared"}, {"u", "m", "vt", "bias"})
    else:  # a class of the user: all its attributes count as its own
        carry_over(layer, dense, set(vars(layer)), {*layer._parameters, *layer._buffers, *layer._modules})
    return dense


_MULTIHEAD = {"in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def projection_weights(attention: nn.MultiheadAttention) -> list[str]:
    """Names of the Parameters that hold the input projections of torch's attention: one packed weight, or three."""
    packed = attention._parameters.get("in_proj_weight") is not None
    return ["in_proj_weight"] if packed else [f"{name}_weight" for name in PROJECTIONS]


def attention_refusal(attention: nn.MultiheadAttention) -> Refusal | None:
    """The reason why the input projections of torch's attention cannot be unpacked, or None."""
    if type(attention).forward is not nn.MultiheadAttention.forward:
        return Refusal(f"{type(attention).__name__} overrides forward")
    if parametrize.is_parametrized(attention):
        return Refusal("its weight is parametrized", "remove the parametrization or exclude it with filter_fn")
    for name in projection_weights(attention):
        weight = attention._parameters.get(name)
        if weight is None:
            return Refusal(f"a hook computes its {name}", "remove it or exclude it with filter_fn")
        if found := _altered_weight(weight):
            return found
    return altered(attention)


def unpack(attention: nn.MultiheadAttention) -> UnpackedMultiheadAttention:
    """The same attention with separate layers as input projections. Their weights are copies."""
    unpacked = UnpackedMultiheadAttention(attention)
    parts = _MULTIHEAD | {f"{name}_weight" for name in PROJECTIONS}
    carry_over(attention, unpacked, set(vars(nn.MultiheadAttention(1, 1, device="meta"))), parts)
    return unpacked


def pack(unpacked: UnpackedMultiheadAttention) -> nn.MultiheadAttention:
    """Inverse of :func:`unpack`. The projections must be ordinary layers."""
    attention = unpacked.to_layer()
    carry_over(unpacked, attention, unpacked.own_attributes | {"_packed", "_in_forward"}, _MULTIHEAD | set(PROJECTIONS))
    return attention
