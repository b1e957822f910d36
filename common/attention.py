"""Attention with narrow heads, torch's attention with projections as layers, and the products of heads as factor pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import linalg
from .decay import FactorPair
from .layers import Factorized, tracing
from .weight import ComposedWeight

Heads = tuple[Tensor, Tensor]  # keys and values, (batch, heads, length, head_dim) each


class MultiheadAttention(nn.Module):
    """Attention without biases, with ``num_heads`` heads of size ``head_dim``, by default ``embed_dim // num_heads``.

    Each head has two products, matrices of shape (embed_dim, embed_dim) and rank ``head_dim``. The query-key product W_Q^T W_K
    scores pairs of positions. The output-value product W_O W_V maps the positions attended to. If heads are narrower than the
    default, they are low-rank factorizations of both products.

    Raises ValueError if ``num_heads`` or ``head_dim`` is below 1, or if ``head_dim`` is None and ``num_heads`` does not divide
    ``embed_dim``.
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int | None = None, *, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"embed_dim {embed_dim} is not divisible by {num_heads} heads: give head_dim")
            head_dim = embed_dim // num_heads
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        self.embed_dim, self.num_heads, self.head_dim, self.dropout = embed_dim, num_heads, head_dim, dropout
        inner = num_heads * head_dim
        self.query = nn.Linear(embed_dim, inner, bias=False)
        self.key = nn.Linear(embed_dim, inner, bias=False)
        self.value = nn.Linear(embed_dim, inner, bias=False)
        self.output = nn.Linear(inner, embed_dim, bias=False)

    def split(self, hidden: Tensor) -> Tensor:
        """(batch, length, heads * head_dim) -> (batch, heads, length, head_dim)."""
        return hidden.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def project(self, memory: Tensor) -> Heads:
        """Keys and values of the memory, (batch, source length, embed_dim), that is attended to."""
        return self.split(self.key(memory)), self.split(self.value(memory))

    def forward(
        self, input: Tensor, memory: Heads | None = None, mask: Tensor | None = None, *, causal: bool = False
    ) -> Tensor:
        """Attend from ``input`` (batch, length, embed_dim) to projected ``memory``, or to ``input`` itself if it is None.

        Without ``memory``, one matrix product with the joined weights gives queries, keys and values, which is faster.

        ``mask`` is broadcast to (batch, heads, length, source length). It is boolean, True where attention is allowed, or holds
        numbers to add to the scores. With ``causal``, each position attends to itself and to the positions before it.
        """
        if memory is None:
            joined = torch.cat([_weight(self.query), _weight(self.key), _weight(self.value)])
            query, keys, values = map(self.split, F.linear(input, joined).chunk(3, -1))
        else:
            query, (keys, values) = self.split(self.query(input)), memory
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.output(attended.transpose(1, 2).flatten(2))

    def _by_head(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.num_heads, self.head_dim, self.embed_dim)
        return left.view(shape).mT, right.view(shape)

    def _by_head_out(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        columns = left.view(self.embed_dim, self.num_heads, self.head_dim)
        return columns.transpose(0, 1), right.view(self.num_heads, self.head_dim, self.embed_dim)

    def query_key(self, name: str) -> FactorPair:
        """The products W_Q^T W_K of all heads: factors (heads, embed_dim, head_dim) and (heads, head_dim, embed_dim).

        ``name`` is the name of the attention. Raises ValueError if a projection is factorized.
        """
        query, key = _parameter(name, self.query), _parameter(name, self.key)
        return FactorPair(f"{name}.query_key", query, key, self._by_head)

    def output_value(self, name: str) -> FactorPair:
        """The products W_O W_V of all heads. Shapes, ``name`` and errors are as in :meth:`query_key`."""
        output, value = _parameter(name, self.output), _parameter(name, self.value)
        return FactorPair(f"{name}.output_value", output, value, self._by_head_out)


@torch.no_grad()
def balance_(pair: FactorPair) -> None:
    """Spectral initialization of a factor pair, in place: balanced factors with the same product.

    The rank of the product is at most that of the factors, so its truncated SVD removes nothing. Do not use it where query
    heads share a key-value head: balancing one pair would change the products of the others.
    """
    for factor, value in zip(pair.factors(), linalg.balance(*pair.factors()), strict=True):
        factor.copy_(value)


class UnpackedMultiheadAttention(nn.MultiheadAttention):
    """torch's MultiheadAttention with the layers ``q_proj``, ``k_proj`` and ``v_proj``, made from an ordinary one.

    The layers have copies of the weights. Biases and the output projection are those of the original. Forward is torch's own.
    It reads the weights, composed if a projection is factorized, from ``in_proj_weight``. If query, key and value differ in
    size, it reads them from ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``.

    Outside of forward, the packed weight and those of factorized projections are :class:`common.weight.ComposedWeight`. It
    cannot be changed in place, because that would not change the layers.
    """

    _packed: Tensor | None = None  # the packed weight during forward, which reads it several times
    _in_forward = False

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
            setattr(self, name, getattr(packed, name))
        self._qkv_same_embed_dim = packed._qkv_same_embed_dim
        self.own_attributes = frozenset(vars(self)) | {"own_attributes"}
        if packed._qkv_same_embed_dim:
            assert packed.in_proj_weight is not None
            weights = packed.in_proj_weight.chunk(3)
        else:
            weights = (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights)
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            self.register_parameter(name, packed._parameters.get(name))
        self.out_proj = packed.out_proj

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        self._in_forward = True
        try:
            self._packed = self.in_proj_weight
            return super().forward(*args, **kwargs)
        finally:
            self._packed, self._in_forward = None, False

    def _reset_parameters(self) -> None:
        """Regular initialization of factorized projections, and torch's of everything else."""
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            if isinstance(layer, Factorized):
                layer.reset_parameters()
            else:
                nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5 if self._qkv_same_embed_dim else 1.0)  # of 3 in one
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    @property
    def in_proj_weight(self) -> Tensor | None:
        if not self._qkv_same_embed_dim:
            return None
        if self._packed is not None:
            return self._packed
        if self._in_forward or tracing():
            return torch.cat(list(map(_weight, (self.q_proj, self.k_proj, self.v_proj))))
        return ComposedWeight.of(_Packed(self), torch.Size((3 * self.embed_dim, self.embed_dim)))

    @property
    def q_proj_weight(self) -> Tensor:
        return self._weight_of(self.q_proj)

    @property
    def k_proj_weight(self) -> Tensor:
        return self._weight_of(self.k_proj)

    @property
    def v_proj_weight(self) -> Tensor:
        return self._weight_of(self.v_proj)

    def _weight_of(self, layer: Any) -> Tensor:
        return _weight(layer) if self._in_forward else layer.weight

    def to_layer(self) -> nn.MultiheadAttention:
        """torch's attention with the same function. The projections must be ordinary layers."""
        layer = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias=self.in_proj_bias is not None,
            add_bias_kv=self.bias_k is not None,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        weights: list[Any] = [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]
        if layer._qkv_same_embed_dim:
            trainable = any(weight.requires_grad for weight in weights)
            layer.in_proj_weight = nn.Parameter(torch.cat(weights).detach(), requires_grad=trainable)
        else:
            layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight = weights
        layer.in_proj_bias, layer.bias_k, layer.bias_v = self.in_proj_bias, self.bias_k, self.bias_v
        layer.out_proj = self.out_proj
        return layer.train(self.training)


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer without bias, with a copy of a weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return layer


def _weight(layer: nn.Module) -> Tensor:
    if isinstance(layer, Factorized):
        return layer.weight_in_use()
    assert isinstance(layer.weight, Tensor)
    return layer.weight


class _Packed:
    """The projections of an attention as one weight, composed of the Parameters of all three."""

    weight_name = "in_proj_weight"

    def __init__(self, attention: UnpackedMultiheadAttention) -> None:
        self.layers = (attention.q_proj, attention.k_proj, attention.v_proj)

    def factors(self) -> tuple[nn.Parameter, ...]:
        return tuple(factor for layer in self.layers for factor in _factors(layer))

    def compose(self, factors: Sequence[Tensor]) -> Tensor:
        given = iter(factors)
        own = [(layer, [next(given) for _ in _factors(layer)]) for layer in self.layers]
        return torch.cat([layer.compose(each) if isinstance(layer, Factorized) else each[0] for layer, each in own])


def _factors(layer: Any) -> tuple[nn.Parameter, ...]:
    return layer.factors() if isinstance(layer, Factorized) else (layer.weight,)


# The two products of attention heads as factor pairs

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Projection:
    """A Parameter, and a function that views it as the matrix (outputs, inputs) of a linear map."""

    parameter: nn.Parameter
    view: View


@dataclass(frozen=True)
class _Attention:
    """The projections of one attention.

    inputs:         projections of query, key and value.
    heads:          number of query heads.
    groups:         number of key-value heads. Each serves ``heads // groups`` query heads.
    biased:         whether the query or key projection has a bias.
    between:        operations between the query and key projections that change their product, or None.
    between_value:  an operation between the value and output projections, or None.
    """

    inputs: Sequence[_Projection]
    output: _Projection
    heads: int
    groups: int
    biased: bool
    between: str | None = None
    between_value: str | None = None


def attention_pairs(
    model: nn.Module, *, query_key: bool = True, output_value: bool = True, ignore_biases: bool = False
) -> list[FactorPair]:
    """The products of the heads of every attention of a model. Pass them to :class:`FrobeniusDecay` as ``pairs``.

    For each head, the query-key product is W_Q^T W_K, (inputs, inputs), which scores pairs of positions. The output-value
    product is W_O W_V, (outputs, inputs), which maps the positions attended to. Supported are torch's MultiheadAttention, that
    of this module, the attention of BERT, GPT-2, ViT and Llama in transformers, and timm's Attention. If a key-value head
    serves n query heads, the products form n pairs. Leave the attention out of :func:`factorize_`.

    Raises ValueError if no attention is found or no product is requested. Raises ValueError, naming the attention, if a
    projection is already factorized or stored head by head, or if a product is not the whole of what the attention computes:
    rotary positions or normalizations are applied between query and key, a gate or normalization is applied between value and
    output, or, without ``ignore_biases``, the query or key projection has a bias, which adds terms to the scores.
    """
    pairs = []
    for name, module in model.named_modules():
        heads = _read(name, module, model)
        if heads is None:
            continue
        query, key, value = heads.inputs
        if query_key:
            remedy = "pass query_key=False"
            if heads.between:
                raise ValueError(
                    f"W_Q^T W_K alone does not give the scores of attention {name!r}: "
                    f"{heads.between} act between query and key; {remedy}"
                )
            if heads.biased and not ignore_biases:
                raise ValueError(
                    f"W_Q^T W_K alone does not give the scores of attention {name!r}: query or key has a bias; "
                    f"pass ignore_biases=True to decay it anyway, or {remedy}"
                )
            pairs += _pairs(f"{name}.query_key", heads, query, key, _transposed_heads)
        if output_value:
            if heads.between_value:
                reason = f"{heads.between_value} acts between value and output; pass output_value=False"
                raise ValueError(f"W_O W_V alone does not give the output of attention {name!r}: {reason}")
            pairs += _pairs(f"{name}.output_value", heads, heads.output, value, _output_heads)
    if not pairs:
        known = "MultiheadAttention of torch and this library, BERT, GPT-2, ViT and Llama in transformers, timm's Attention"
        raise ValueError(f"found no attention in {type(model).__name__}, or no product was requested: supported are {known}")
    return pairs


def _transposed_heads(matrix: Tensor, heads: int) -> Tensor:
    """(heads * head_dim, inputs) -> (heads, inputs, head_dim)."""
    return matrix.unflatten(0, (heads, -1)).mT


def _output_heads(matrix: Tensor, heads: int) -> Tensor:
    """(outputs, heads * head_dim) -> (heads, outputs, head_dim)."""
    return matrix.unflatten(1, (heads, -1)).transpose(0, 1)


def _pairs(
    name: str, heads: _Attention, left: _Projection, right: _Projection, by_head: Callable[[Tensor, int], Tensor]
) -> list[FactorPair]:
    """Pairs of ``left``, split by head, and ``right``: one for each of the query heads that share a key-value head."""
    shared = heads.heads // heads.groups

    def pair(index: int) -> FactorPair:
        def view(u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
            return by_head(left.view(u), heads.heads)[index::shared], right.view(vt).unflatten(0, (heads.groups, -1))

        return FactorPair(f"{name}.{index}" if shared > 1 else name, left.parameter, right.parameter, view)

    return [pair(index) for index in range(shared)]


def _read(name: str, module: Any, model: nn.Module) -> _Attention | None:
    """The projections of a module that is an attention of a supported kind, or None."""
    names = {kind.__name__ for kind in type(module).__mro__}
    if isinstance(module, nn.MultiheadAttention):
        return _read_torch(name, module)
    if isinstance(module, MultiheadAttention):
        return _read_separate(name, module, ("query", "key", "value"), module.output)
    if names & {"BertSelfAttention", "BertCrossAttention", "ViTSelfAttention"}:
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        return _read_separate(name, module, ("query", "key", "value"), parent.output.dense)
    if names & {"ViTAttention", "LlamaAttention"} and hasattr(module, "q_proj"):
        between = "rotary positions" if "LlamaAttention" in names else None
        return _read_separate(name, module, ("q_proj", "k_proj", "v_proj"), module.o_proj, between)
    if "GPT2Attention" in names:
        return _read_gpt2(name, module)
    if names & {"Attention", "AttentionRope"} and any(kind.__module__.startswith("timm.") for kind in type(module).__mro__):
        return _read_timm(name, module, "rotary positions" if "AttentionRope" in names else None)
    return None


def _parameter(name: str, layer: Any) -> nn.Parameter:
    if not isinstance(layer, Factorized) and isinstance(layer.weight, nn.Parameter):
        return layer.weight
    raise ValueError(
        f"a projection of attention {name!r} is not an ordinary layer ({type(layer).__name__}): products of heads need "
        "ordinary layers, and FrobeniusDecay covers factorized ones itself; leave attention out of factorize_ with filter_fn"
    )


def _rows(part: int, of: int) -> View:
    """A view that takes one of ``of`` equal parts of the rows."""
    return lambda weight: weight.unflatten(0, (of, -1))[part]


def _columns(part: int, of: int) -> View:
    """A view that takes one of ``of`` equal parts of the columns of a weight (inputs, outputs), and transposes it."""
    return lambda weight: weight.unflatten(1, (of, -1))[:, part].mT


def _read_torch(name: str, module: nn.MultiheadAttention) -> _Attention:
    if isinstance(module, UnpackedMultiheadAttention):
        inputs = [_Projection(_parameter(name, layer), _rows(0, 1)) for layer in (module.q_proj, module.k_proj, module.v_proj)]
    elif module._qkv_same_embed_dim:
        assert module.in_proj_weight is not None
        inputs = [_Projection(module.in_proj_weight, _rows(part, 3)) for part in range(3)]
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        inputs = [_Projection(weight, _rows(0, 1)) for weight in weights]
    output = _Projection(_parameter(name, module.out_proj), _rows(0, 1))
    heads = module.num_heads
    return _Attention(inputs, output, heads, heads, module.in_proj_bias is not None)


def _read_separate(
    name: str, module: Any, parts: tuple[str, str, str], output: nn.Module, between: str | None = None
) -> _Attention:
    layers = [getattr(module, part) for part in parts]
    inputs = [_Projection(_parameter(name, layer), _rows(0, 1)) for layer in layers]
    size = getattr(module, "head_dim", None) or module.attention_head_size
    heads, groups = (len(projection.parameter) // size for projection in inputs[:2])
    biased = any(layer.bias is not None for layer in layers[:2])
    return _Attention(inputs, _Projection(_parameter(name, output), _rows(0, 1)), heads, groups, biased, between)


def _read_gpt2(name: str, module: Any) -> _Attention:
    packed = _parameter(name, module.c_attn)
    if module.is_cross_attention:
        inputs = [_Projection(_parameter(name, module.q_attn), _columns(0, 1))]
        inputs += [_Projection(packed, _columns(part, 2)) for part in range(2)]
    else:
        inputs = [_Projection(packed, _columns(part, 3)) for part in range(3)]
    output = _Projection(_parameter(name, module.c_proj), _columns(0, 1))
    return _Attention(inputs, output, module.num_heads, module.num_heads, biased=True)


def _read_timm(name: str, module: Any, between: str | None) -> _Attention | None:
    if getattr(module, "qkv", None) is None or not hasattr(module, "proj"):
        return None
    if hasattr(module, "key_dim"):  # TinyViT, EfficientFormer
        raise ValueError(
            f"attention {name!r} ({type(module).__module__}) stores queries, keys and values head by head, which is not "
            "supported: give its products as FactorPairs of your own"
        )
    inputs = [_Projection(_parameter(name, module.qkv), _rows(part, 3)) for part in range(3)]
    if not all(isinstance(getattr(module, norm, nn.Identity()), nn.Identity) for norm in ("q_norm", "k_norm")):
        between = "normalizations"
    between_value = "a gate" if getattr(module, "gate", None) is not None else None
    if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        between_value = "a normalization"
    biased = module.qkv.bias is not None or getattr(module, "q_bias", None) is not None
    output = _Projection(_parameter(name, module.proj), _rows(0, 1))
    return _Attention(inputs, output, module.num_heads, module.num_heads, biased, between, between_value)
