"""Attention: torch's, with input projections that can be factorized, and the two products of its heads as factor pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layers import Factorized


class UnpackedMultiheadAttention(nn.MultiheadAttention):
    """torch's MultiheadAttention with ``q_proj``, ``k_proj`` and ``v_proj`` as layers, made from an ordinary one.

    The layers have copies of the weights; biases and the output projection are those of the original. Forward is torch's own,
    with the weights of factorized projections composed, which ``in_proj_weight`` or, where query, key and value differ in
    size, ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` read as.
    """

    _packed: Tensor | None = None  # the packed weight, during forward, which reads it several times

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
        self._packed = self.in_proj_weight
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._packed = None

    @property
    def in_proj_weight(self) -> Tensor | None:
        if not self._qkv_same_embed_dim:
            return None
        if self._packed is not None:
            return self._packed
        return torch.cat((self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))

    @property
    def q_proj_weight(self) -> Tensor:
        return _weight(self.q_proj)

    @property
    def k_proj_weight(self) -> Tensor:
        return _weight(self.k_proj)

    @property
    def v_proj_weight(self) -> Tensor:
        return _weight(self.v_proj)

    def to_layer(self) -> nn.MultiheadAttention:
        """torch's attention of the same function; its projections must be ordinary layers."""
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
    """A linear layer without bias of a copy of a weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return layer


def _weight(layer: nn.Module) -> Tensor:
    if isinstance(layer, Factorized):
        return layer.weight_in_use()
    assert isinstance(layer.weight, Tensor)
    return layer.weight
