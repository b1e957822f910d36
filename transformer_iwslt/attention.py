"""Multi-head attention without biases, whose heads may be narrow, and its two products as factor pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import FactorPair
from common.linalg import balance

Heads = tuple[Tensor, Tensor]  # keys and values, (batch, heads, length, head_dim) each


class MultiheadAttention(nn.Module):
    """Attention of ``num_heads`` heads of ``head_dim`` dimensions each, by default ``embed_dim // num_heads``.

    Of each head the two products are matrices of (embed_dim, embed_dim) and rank ``head_dim``: query-key, W_Q^T W_K,
    which scores a pair of positions, and output-value, W_O W_V, which maps what is attended to. A head
    narrower than usual is a low-rank factorization of both.
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int | None = None, *, dropout: float = 0.0) -> None:
        super().__init__()
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"embed_dim {embed_dim} does not split over {num_heads} heads: give head_dim")
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
        """Keys and values of what is attended to, (batch, source length, embed_dim)."""
        return self.split(self.key(memory)), self.split(self.value(memory))

    def forward(self, input: Tensor, memory: Heads, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """Attend from ``input`` (batch, length, embed_dim) to projected ``memory``.

        ``mask`` is boolean, broadcast to (batch, heads, length, source length), and True where attention is allowed;
        ``causal`` allows each position itself and those before it.
        """
        dropout = self.dropout if self.training else 0.0
        query = self.split(self.query(input))
        attended = F.scaled_dot_product_attention(query, *memory, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.output(attended.transpose(1, 2).flatten(2))

    def _by_head(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.num_heads, self.head_dim, self.embed_dim)
        return left.view(shape).mT, right.view(shape)

    def _by_head_out(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        columns = left.view(self.embed_dim, self.num_heads, self.head_dim)
        return columns.transpose(0, 1), right.view(self.num_heads, self.head_dim, self.embed_dim)

    def query_key(self, name: str) -> FactorPair:
        """The products W_Q^T W_K of all heads: factors (heads, embed_dim, head_dim) and (heads, head_dim, embed_dim)."""
        return FactorPair(f"{name}.query_key", _weight(self.query), _weight(self.key), self._by_head)

    def output_value(self, name: str) -> FactorPair:
        """The products W_O W_V of all heads, in the shapes of :meth:`query_key`."""
        return FactorPair(f"{name}.output_value", _weight(self.output), _weight(self.value), self._by_head_out)


def _weight(linear: nn.Linear) -> nn.Parameter:
    assert isinstance(linear.weight, nn.Parameter)
    return linear.weight


@torch.no_grad()
def balance_(pair: FactorPair) -> None:
    """Spectral initialization of a factor pair, in place: the same product, from balanced factors.

    The product has the rank of the factors already, so that its truncated SVD truncates nothing.
    """
    for factor, value in zip(pair.factors(), balance(*pair.factors()), strict=True):
        factor.copy_(value)
