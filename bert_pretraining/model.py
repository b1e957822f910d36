"""A masked language model in plain torch: a pre-norm, bias-free encoder with factorized heads, layers and embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_pretraining.config import INITS, POSITIONS
from common import (
    FactorizationReport,
    FactorizedEmbedding,
    FactorPair,
    FrobeniusDecay,
    LowRankConfig,
    MultiheadAttention,
    factorize_,
    linalg,
)
from common.budget import count_parameters
from common.experiments.checkpoints import load_weights_

Init = Literal["regular", "spectral", "norm-matched"]


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a masked language model, and how it is factorized.

    Rank scales are in [0, 1]; 0 and 1 leave the full width.

    positions:              "learned" (a table), "alibi" (each head subtracts a multiple of the distance from its scores), or
                            "directed-alibi" (each head also sees one side only). With "alibi" an encoder cannot tell the two
                            sides apart: of a reversed sequence it gives the reversed output.
    max_positions:          maximum number of tokens in a sequence.
    dropout:                dropout of embeddings, of attention weights, and of the output of each attention and feed-forward.
    init_std:               standard deviation of all initial weights, by default .02 sqrt(768 / embed_dim).
    rank_scale:             rank scale of heads: each has int(rank_scale * embed_dim / heads) dimensions.
    rank_scale_layers:      rank scale of the feed-forward layers.
    rank_scale_embeddings:  rank scale of the word and position tables.
    init:                   initialization of factorized layers and tables: "regular" (each factor is drawn like any weight),
                            "spectral" or "norm-matched", as in :class:`LowRankConfig`.
    quekey_init:            initialization of the heads' query-key products: "regular", "spectral" or "norm-matched", as in
                            :func:`initialize_heads_`. outval_init: the same for output-value products.
    spectral_from:          what "spectral" decomposes: "full" heads, or the "narrow" heads themselves.

    Raises ValueError naming the value and the limit.
    """

    words: int
    embed_dim: int
    ffn_dim: int
    layers: int
    heads: int
    positions: Literal["learned", "alibi", "directed-alibi"] = "learned"
    max_positions: int = 512
    dropout: float = 0.0
    init_std: float | None = None
    rank_scale: float = 0.0
    rank_scale_layers: float = 0.0
    rank_scale_embeddings: float = 0.0
    init: Init = "regular"
    quekey_init: Init = "regular"
    outval_init: Init = "regular"
    spectral_from: Literal["full", "narrow"] = "full"

    def __post_init__(self) -> None:
        for name in ("words", "embed_dim", "ffn_dim", "layers", "heads", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.embed_dim % self.heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by {self.heads} heads")
        if self.positions == "rotary":
            raise ValueError(
                f"positions must be {' or '.join(POSITIONS)}, not rotary: rotation gives each distance its own query-key "
                "product, so there is no single one to initialize or decay"
            )
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be {' or '.join(POSITIONS)}, got {self.positions!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.init_std is not None and not 0 < self.init_std < math.inf:
            raise ValueError(f"init_std must be positive and finite, got {self.init_std}")
        for name in ("rank_scale", "rank_scale_layers", "rank_scale_embeddings"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], where 0 and 1 are full width, got {getattr(self, name)}")
        for name in ("init", "quekey_init", "outval_init"):
            if getattr(self, name) not in INITS:
                raise ValueError(f"{name} must be one of {', '.join(INITS)}, got {getattr(self, name)!r}")
        if self.init != "regular" and not (_narrows(self.rank_scale_layers) or _narrows(self.rank_scale_embeddings)):
            raise ValueError(f"init {self.init!r} needs rank_scale_layers or rank_scale_embeddings between 0 and 1")
        for name in ("quekey_init", "outval_init"):
            if getattr(self, name) == "norm-matched" and not _narrows(self.rank_scale):
                raise ValueError(
                    f"{name} 'norm-matched' needs a rank_scale between 0 and 1, got {self.rank_scale}: "
                    "products of full heads already have the norm of their spectral initialization"
                )
        if self.spectral_from not in ("full", "narrow"):
            raise ValueError(f"spectral_from must be full or narrow, got {self.spectral_from!r}")
        if self.head_dim < 1:
            raise ValueError(
                f"rank_scale {self.rank_scale} leaves no dimension of the {self.full_head_dim} of a head: "
                f"it must be at least {1 / self.full_head_dim:g}"
            )

    @property
    def full_head_dim(self) -> int:
        return self.embed_dim // self.heads

    @property
    def head_dim(self) -> int:
        """Dimensions of a head: rank_scale times those of a full head, rounded down."""
        return int(self.rank_scale * self.full_head_dim) if _narrows(self.rank_scale) else self.full_head_dim

    @property
    def std(self) -> float:
        """Standard deviation of all initial weights."""
        return 0.02 * math.sqrt(768 / self.embed_dim) if self.init_std is None else self.init_std


def _narrows(rank_scale: float) -> bool:
    return 0 < rank_scale < 1


class FeedForward(nn.Module):
    """Two layers without biases and a GELU between them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with its normalization before it and a residual connection around it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(config.embed_dim, bias=False) for _ in range(2))
        self.self_attention = MultiheadAttention(config.embed_dim, config.heads, config.head_dim, dropout=config.dropout)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """Output for ``x`` (batch, length, embed_dim); with ``positions`` (batch, predictions), only at these positions.

        ``mask`` is that of :class:`MultiheadAttention`. With ``positions``, it has one row for each of them.
        """
        normed, memory = self.norm1(x), None
        if positions is not None:
            memory = self.self_attention.project(normed)
            x, normed = _take(x, positions), _take(normed, positions)
        x = x + self.dropout(self.self_attention(normed, memory, mask))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class MaskedLanguageModel(nn.Module):
    """An encoder whose token embedding also scores the words at masked positions.

    It is initialized and factorized as configured. ``report`` lists what was factorized, compared with the full-width model.
    The initialization of the heads does not affect the other random draws.
    """

    alibi: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # the layers' own draws are discarded; they depend on the width of heads
            self.embed_tokens: nn.Module = nn.Embedding(config.words, config.embed_dim)
            if config.positions == "learned":
                self.embed_positions = nn.Embedding(config.max_positions, config.embed_dim)
            self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        if config.positions != "learned":
            bias = (directed_alibi if config.positions == "directed-alibi" else alibi)(config.heads, config.max_positions)
            self.register_buffer("alibi", bias, persistent=False)
        self.norm = nn.LayerNorm(config.embed_dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self._initialize()
        self.report = self._factorize()

    def _initialize(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, MultiheadAttention):
                for pair, init in (
                    (module.query_key(name), self.config.quekey_init),
                    (module.output_value(name), self.config.outval_init),
                ):
                    initialize_heads_(pair, self.config.full_head_dim, self.config.std, init, self.config.spectral_from)
            elif isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and "feed_forward" in name):
                nn.init.normal_(module.weight, std=self.config.std)

    def _factorize(self) -> FactorizationReport:
        config, rows = self.config, []
        for scale, chosen in (
            (config.rank_scale_embeddings, lambda module, name: isinstance(module, nn.Embedding)),
            (config.rank_scale_layers, lambda module, name: "feed_forward" in name),
        ):
            if _narrows(scale):
                init = partial(_draw_factors, config.std) if config.init == "regular" else config.init
                rows += factorize_(self, LowRankConfig(scale, init), filter_fn=chosen, skip_growing=False).layers
        return FactorizationReport(tuple(rows), count_full(config), count_parameters(self))

    def encode(self, tokens: Tensor, words: Tensor | None = None) -> Tensor:
        """Normalized representations (batch, length, embed_dim) of ``tokens`` (batch, length).

        ``words`` is True at positions that hold a token, of which each sequence needs at least one; None if all do. The
        outputs at other positions are meaningless.
        """
        x, mask = self._embed(tokens, words)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)

    def score(self, hidden: Tensor) -> Tensor:
        """Scores (..., words) of each word, from the representations (..., embed_dim) of positions."""
        table = self.embed_tokens
        if not isinstance(table, FactorizedEmbedding):
            assert isinstance(table.weight, Tensor)
            return F.linear(hidden, table.weight)
        (rows, rank), columns, positions = table.u.shape, table.vt.shape[1], hidden.numel() // hidden.shape[-1]
        if positions * rank * (rows + columns) > rows * columns * (rank + positions):
            return F.linear(hidden, table.to_dense())
        return F.linear(F.linear(hidden, table.vt), table.u)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Scores (batch * predictions, words) at ``positions`` (batch, predictions) of ``tokens`` (batch, length).

        The last layer computes only what these positions need.
        """
        x, mask = self._embed(tokens, None)
        *before, last = self.layers
        for layer in before:
            x = layer(x, mask)
        if mask is not None:
            mask = mask[0][:, positions].transpose(0, 1)
        return self.score(self.norm(last(x, mask, positions)).flatten(0, 1))

    def _embed(self, tokens: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The input of the first layer, and the mask of every attention."""
        length = tokens.shape[1]
        if length > self.config.max_positions:
            raise ValueError(f"a sequence of {length} tokens is longer than max_positions {self.config.max_positions}")
        x, mask = self.embed_tokens(tokens), None if words is None else words[:, None, None, :]
        if self.config.positions == "learned":
            return self.dropout(x + self.embed_positions(torch.arange(length, device=tokens.device))), mask
        bias = self.alibi[None, :, :length, :length]
        if mask is not None:  # padding sees itself, since it is NaN if it sees nothing
            bias = bias.masked_fill(~(mask | torch.eye(length, dtype=torch.bool, device=tokens.device)), -math.inf)
        return self.dropout(x), bias


def _take(x: Tensor, positions: Tensor) -> Tensor:
    """The values of ``x`` at positions: (batch, length, ...), (batch, predictions) -> (batch, predictions, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], positions]


def alibi(heads: int, length: int) -> Tensor:
    """The bias (heads, length, length) that ALiBi adds to attention scores: minus the head's slope times the distance.

    The slopes are those of Press, Smith and Lewis (ICLR 2022): 2^(-8 / heads), its square and so on. If the number of heads is
    not a power of two, they are the slopes for the next lower power of two, followed by every other slope for twice that power.
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    places = torch.arange(length)
    return -torch.tensor(slopes)[:, None, None] * (places - places[:, None]).abs()


def directed_alibi(heads: int, length: int) -> Tensor:
    """ALiBi (heads, length, length) for encoders that tell the two sides apart.

    The heads 0, 2, ... see no token after their own, and the heads 1, 3, ... none before it. A head and the next have the same
    slope; slopes are those of :func:`alibi` for half as many heads.
    """
    bias = alibi((heads + 1) // 2, length).repeat_interleave(2, 0)[:heads].clone()
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)  # keys after the query
    bias[::2].masked_fill_(ahead, -math.inf)
    bias[1::2].masked_fill_(ahead.mT, -math.inf)
    return bias


@torch.no_grad()
def initialize_heads_(pair: FactorPair, full: int, std: float, init: Init, spectral_from: Literal["full", "narrow"]) -> None:
    """Draw the factors of a product of heads, in place, from heads of ``full`` dimensions drawn from N(0, std^2).

    "regular" takes the first dimensions of the full heads, which equals drawing narrow heads directly. "spectral" takes
    balanced factors: from "full", those of the truncated SVD of the full heads' product; from "narrow", those of the whole
    product of the regular heads. "norm-matched" scales the regular heads so that each product has the norm that "spectral"
    from "full" gives. All of them draw the same random numbers.
    """
    u, vt = pair.factors()
    heads, rows, rank = u.shape
    wide = u.new_empty(heads, rows, full).normal_(std=std), vt.new_empty(heads, full, vt.shape[2]).normal_(std=std)
    found = wide[0][..., :rank], wide[1][:, :rank]
    if init == "spectral" and spectral_from == "narrow":
        found = linalg.balance(*found)
    elif init != "regular":
        left, right = linalg.balance(*wide)
        leading = left[..., :rank], right[:, :rank]
        norm = linalg.frobenius_norm([linalg.to_float64(factor) for factor in leading])
        found = leading if init == "spectral" else linalg.rescale(found, norm)
    for factor, value in zip((u, vt), found, strict=True):
        factor.copy_(value)


def _draw_factors(std: float, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors for a matrix; only its shape, dtype and device are used."""
    rows, columns = matrix.shape
    return matrix.new_empty(rows, rank).normal_(std=std), matrix.new_empty(rank, columns).normal_(std=std)


def products(model: nn.Module) -> dict[str, list[FactorPair]]:
    """The products of the heads of every attention of a model: query-key ("quekey") and output-value ("outval")."""
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, MultiheadAttention)}
    return {
        "quekey": [attention.query_key(name) for name, attention in attentions.items()],
        "outval": [attention.output_value(name) for name, attention in attentions.items()],
    }


def frobenius_decay(
    model: nn.Module, coef: float, layers: bool, query_key: bool, output_value: bool, *, decoupled: bool = False
) -> FrobeniusDecay | None:
    """Frobenius decay of factorized layers and tables, query-key products and output-value products, or None if all are off."""
    found = products(model)
    pairs = (found["quekey"] if query_key else []) + (found["outval"] if output_value else [])
    if not layers and not pairs:
        return None
    return FrobeniusDecay(model, coef, pairs=pairs, layers=layers, decoupled=decoupled)


def count_full(config: EncoderConfig) -> int:
    """Number of parameters of the same model without factorization, computed from its shapes."""
    rows = config.words + (config.max_positions if config.positions == "learned" else 0)
    layer = 4 * config.embed_dim**2 + 2 * config.embed_dim * config.ffn_dim + 2 * config.embed_dim
    return rows * config.embed_dim + config.layers * layer + config.embed_dim


def from_checkpoint(architecture: Mapping[str, Any], weights: Mapping[str, Tensor]) -> MaskedLanguageModel:
    """The model with these configuration fields and this state dict. Raises ValueError naming what does not match.

    The state of torch's random generator does not change.
    """
    known = {field.name: field.default for field in fields(EncoderConfig)}
    for name in sorted(architecture.keys() - known.keys()):
        raise ValueError(f"the checkpoint's architecture has {name!r}, which is not known here")
    for name, default in known.items():
        if default is MISSING and name not in architecture:
            raise ValueError(f"the checkpoint's architecture lacks {name!r}")
    config = EncoderConfig(**architecture)
    with torch.random.fork_rng(devices=[]):
        model = MaskedLanguageModel(replace(config, init="regular", quekey_init="regular", outval_init="regular"))
    model.config = config
    load_weights_(model, weights)
    return model
