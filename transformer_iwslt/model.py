"""The Transformer of the translation experiments in plain torch: pre-norm, bias-free, factorized, with incremental decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import FactorizationReport, FactorPair, FrobeniusDecay, LowRankConfig, MultiheadAttention, balance_, factorize_
from common.attention import Heads
from common.budget import count_parameters
from common.experiments.checkpoints import load_weights_

INITS = ("regular", "spectral", "norm-matched")
PAD, EOS = 1, 2  # indices of a fairseq dictionary: <s>, <pad>, </s>, <unk>, then words
MAX_POSITIONS = 1024
LONGEST = MAX_POSITIONS - PAD - 2  # the most subwords of a sentence that leave a position for </s>

# As the released code draws weights, and factors that are initialized directly.
draw_embedding_ = partial(nn.init.normal_, std=0.1)
draw_linear_ = partial(nn.init.uniform_, a=-0.1, b=0.1)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Transformer, and how it is factorized.

    rank_scale:        between 0 and 1, feed-forward, embedding and output layers are factorized at this rank scale, and heads
                       have this share of their dimensions. 0 and 1 leave the model dense.
    init:              initialization of factorized layers: "regular" (each factor is drawn like the layer itself), "spectral"
                       or "norm-matched".
    spectral_quekey:   spectral initialization of the query-key products; spectral_outval: of the output-value products.
    max_positions:     rows of the position tables; the first two belong to no position.

    Raises ValueError naming the value and the limit.
    """

    source_words: int
    target_words: int
    embed_dim: int = 256
    ffn_dim: int = 1024
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    max_positions: int = MAX_POSITIONS
    rank_scale: float = 0.0
    init: Literal["regular", "spectral", "norm-matched"] = "regular"
    spectral_quekey: bool = False
    spectral_outval: bool = False

    def __post_init__(self) -> None:
        for name in ("source_words", "target_words", "embed_dim", "ffn_dim", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.embed_dim % self.heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by {self.heads} heads")
        if self.max_positions < PAD + 3:
            raise ValueError(f"max_positions must be at least {PAD + 3}, got {self.max_positions}")
        if not 0 <= self.rank_scale <= 1:
            raise ValueError(f"rank_scale must be in [0, 1], got {self.rank_scale}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        if self.init != "regular" and not self.factorized:
            raise ValueError(f"init {self.init!r} needs a rank_scale between 0 and 1, got {self.rank_scale}")

    @property
    def factorized(self) -> bool:
        return 0 < self.rank_scale < 1

    def without_decomposition(self) -> TransformerConfig:
        """The same shapes without any SVD, for a model that serves only for its shapes or gets its weights from elsewhere."""
        return replace(self, init="regular", spectral_quekey=False, spectral_outval=False)

    @property
    def head_dim(self) -> int:
        """Dimensions of a head: rank_scale times those of a full head, rounded down as in the released code, at least 1."""
        full = self.embed_dim // self.heads
        return max(1, int(self.rank_scale * full)) if self.factorized else full


class FeedForward(nn.Module):
    """Two layers without biases and a ReLU between them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim, bias=False)
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with its normalization before it and a residual connection around it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.embed_dim), nn.LayerNorm(config.embed_dim)
        self.self_attention = _attention(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.norm1(x)
        x = x + self.dropout(self.self_attention(normed, self.self_attention.project(normed), mask))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, and feed-forward, as in :class:`EncoderLayer`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.embed_dim) for _ in range(3))
        self.self_attention = _attention(config)
        self.cross_attention = _attention(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Heads, mask: Tensor | None, past: Heads | None) -> tuple[Tensor, Heads]:
        """``past`` holds the projections of earlier positions, to which ``x`` adds one; without it, ``x`` holds all positions.

        Returns the output and the projections of all positions so far.
        """
        normed = self.norm1(x)
        own = self.self_attention.project(normed)
        if past is not None:
            own = torch.cat([past[0], own[0]], dim=2), torch.cat([past[1], own[1]], dim=2)
        x = x + self.dropout(self.self_attention(normed, own, causal=past is None))
        x = x + self.dropout(self.cross_attention(self.norm2(x), memory, mask))
        return x + self.dropout(self.feed_forward(self.norm3(x))), own


def _attention(config: TransformerConfig) -> MultiheadAttention:
    return MultiheadAttention(config.embed_dim, config.heads, config.head_dim, dropout=config.attention_dropout)


class Encoder(nn.Module):
    """Source words to their representations."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.source_words, config.embed_dim, PAD)
        self.embed_positions = nn.Embedding(config.max_positions, config.embed_dim, PAD)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """``source`` is (batch, length), padded with PAD on either side.

        Returns (batch, length, embed_dim) and the mask for :class:`MultiheadAttention`, which is None if nothing is padded.
        """
        words = source.ne(PAD)
        mask = None if words.all() else words[:, None, None, :]
        positions = words.cumsum(1) * words + PAD
        x = self.dropout(self.embed_tokens(source) + self.embed_positions(positions))
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x), mask


@dataclass
class DecoderState:
    """State of incremental decoding of a batch: projections of the source and, for each layer, of the words so far."""

    memory: list[Heads]
    mask: Tensor | None
    past: list[Heads | None]
    length: int = 0

    def reorder(self, order: Tensor) -> None:
        """Replace row i of the batch by row ``order[i]``, in place."""
        self.memory = [(keys[order], values[order]) for keys, values in self.memory]
        self.mask = None if self.mask is None else self.mask[order]
        self.past = [None if past is None else (past[0][order], past[1][order]) for past in self.past]


class Decoder(nn.Module):
    """Maps the target words so far and the encoder's output to scores of the next word."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.target_words, config.embed_dim, PAD)
        self.embed_positions = nn.Embedding(config.max_positions, config.embed_dim, PAD)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.embed_dim)
        self.out_embed = nn.Linear(config.embed_dim, config.target_words)
        self.dropout = nn.Dropout(config.dropout)

    def start(self, encoded: Tensor, mask: Tensor | None) -> DecoderState:
        """State before the first word."""
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        return DecoderState([layer.cross_attention.project(encoded) for layer in layers], mask, [None] * len(layers))

    def forward(self, target: Tensor, state: DecoderState) -> Tensor:
        """Scores (batch, length, target_words) of the word that follows each position of ``target`` (batch, length).

        ``target`` begins with EOS and is padded on the right; the scores at padded positions are meaningless. Further calls
        with the same state take only the next word (batch, 1), since the state holds those before it.
        """
        if state.length and target.shape[1] != 1:
            raise ValueError(f"incremental decoding takes one word at a time, got {target.shape[1]} after {state.length}")
        start = PAD + 1 + state.length
        positions = torch.arange(start, start + target.shape[1], device=target.device)
        x = self.dropout(self.embed_tokens(target) + self.embed_positions(positions))
        for index, layer in enumerate(self.layers):
            x, state.past[index] = layer(x, state.memory[index], state.mask, state.past[index])
        state.length += target.shape[1]
        return self.out_embed(self.norm(x))


class Transformer(nn.Module):
    """Encoder and decoder, initialized and factorized as configured. ``report`` lists the layers that were factorized."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self._initialize()
        self.report = self._factorize()
        for name, attention in attentions(self).items():
            if config.spectral_quekey:
                balance_(attention.query_key(name))
            if config.spectral_outval:
                balance_(attention.output_value(name))

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw_linear_(module.weight)
                if module.bias is not None:
                    draw_linear_(module.bias)
            elif isinstance(module, nn.Embedding):
                draw_embedding_(module.weight)
                with torch.no_grad():
                    module.weight[PAD].zero_()

    def _factorize(self) -> FactorizationReport:
        config = self.config
        if not config.factorized:
            return FactorizationReport.dense(self)
        heads = {id(linear) for attention in attentions(self).values() for linear in attention.children()}
        reports = []
        for kind, draw_ in ((nn.Embedding, draw_embedding_), (nn.Linear, draw_linear_)):
            init = partial(_draw_factors, draw_) if config.init == "regular" else config.init
            how = LowRankConfig(config.rank_scale, init)
            chosen = {id(m) for m in self.modules() if isinstance(m, kind) and id(m) not in heads}
            reports.append(factorize_(self, how, filter_fn=partial(_is_chosen, chosen), skip_growing=False))
        full = count_full(config)
        return FactorizationReport((*reports[0].layers, *reports[1].layers), full, count_parameters(self))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores (batch, target length, target_words) of the word after each position of ``target``; see :class:`Decoder`."""
        return self.decoder(target, self.decoder.start(*self.encoder(source)))


def _is_chosen(chosen: Set[int], module: nn.Module, name: str) -> bool:
    return id(module) in chosen


def _draw_factors(draw_: Callable[[Tensor], Tensor], matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors for a matrix; only its shape, dtype and device are used."""
    rows, columns = matrix.shape
    return draw_(matrix.new_empty(rows, rank)), draw_(matrix.new_empty(rank, columns))


def attentions(model: nn.Module) -> dict[str, MultiheadAttention]:
    """The attention modules of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MultiheadAttention)}


def frobenius_decay(model: nn.Module, coef: float, layers: bool, query_key: bool, output_value: bool) -> FrobeniusDecay | None:
    """Frobenius decay of factorized layers, query-key products and output-value products, or None if all three are off."""
    pairs: list[FactorPair] = []
    for name, attention in attentions(model).items():
        pairs += [attention.query_key(name)] if query_key else []
        pairs += [attention.output_value(name)] if output_value else []
    return FrobeniusDecay(model, coef, pairs=pairs, layers=layers) if layers or pairs else None


def count_full(config: TransformerConfig) -> int:
    """Number of parameters of the same Transformer without factorization, computed from its shapes."""
    words = config.source_words + 2 * config.target_words + 2 * config.max_positions
    attention, feed_forward, norm = 4 * config.embed_dim**2, 2 * config.embed_dim * config.ffn_dim, 2 * config.embed_dim
    layer = 3 * attention + 2 * feed_forward + 5 * norm  # of the encoder and of the decoder
    return words * config.embed_dim + config.target_words + config.layers * layer + 2 * norm


def from_checkpoint(architecture: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Transformer:
    """The model with these configuration fields and this state dict. Raises ValueError naming what does not match."""
    unknown = sorted(architecture.keys() - {field.name for field in fields(TransformerConfig)})
    if unknown:
        raise ValueError(f"the checkpoint's architecture has {unknown[0]!r}, which is not known here")
    config = TransformerConfig(**architecture)
    model = Transformer(config.without_decomposition())
    model.config = config
    load_weights_(model, weights)
    return model
