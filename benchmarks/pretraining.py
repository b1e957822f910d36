"""Masked pre-training: time a training step, compared with transformers' BERT and fairseq's RoBERTa of the same sizes.

    python -m benchmarks.pretraining [--repeats N] [--threads N] [--markdown]

The models have 4 layers of 256 dimensions with 4 heads, 8,192 words, and no dropout. A batch has 16 sequences of 128 tokens
with 20 predictions each. A step is the forward pass, cross-entropy, the backward pass, AdamW, and Frobenius decay if the name
says so. The models take turns in one process. transformers and fairseq are left out if they are not installed.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Call, arguments, interleaved, ratio, show, spread
from bert_pretraining.model import EncoderConfig, MaskedLanguageModel, frobenius_decay
from common import FrobeniusDecay, param_groups
from common.budget import count_parameters
from common.experiments.config import positive_int

WORDS, EMBED, FFN, LAYERS, HEADS, POSITIONS = 8192, 256, 1024, 4, 4, 512
BATCH, LENGTH, PREDICTIONS = 16, 128, 20
LR, WEIGHT_DECAY = 1e-4, 0.01
FIRST = "ours, dense"
SPECTRAL = {"quekey_init": "spectral", "outval_init": "spectral"}
OURS: dict[str, dict[str, Any]] = {
    FIRST: {},
    "ours, dense, ALiBi": {"positions": "alibi"},
    "ours, heads at 0.5": {"rank_scale": 0.5},
    "ours, heads at 0.5, spectral, Frobenius decay": {"rank_scale": 0.5, **SPECTRAL},
    "ours, heads and layers at 0.5": {"rank_scale": 0.5, "rank_scale_layers": 0.5},
    "ours, heads and layers at 0.5, spectral, Frobenius decay": {
        **{"rank_scale": 0.5, "rank_scale_layers": 0.5, "init": "spectral"},
        **SPECTRAL,
    },
}
Logits = Callable[[Tensor, Tensor], Tensor]  # of tokens (batch, length) at positions (batch, predictions)


def transformers_bert() -> tuple[nn.Module, Logits]:
    """BERT of transformers. It scores the words at every position; the loss uses only the masked ones."""
    transformers: Any = import_module("transformers")
    sizes = {"vocab_size": WORDS, "max_position_embeddings": POSITIONS, "type_vocab_size": 1}
    sizes |= {"hidden_size": EMBED, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **none))
    return model, lambda tokens, positions: model(tokens).logits[_mask(positions)]


def fairseq_roberta() -> tuple[nn.Module, Logits]:
    """RoBERTa of fairseq. It scores the words at masked positions only."""
    from benchmarks.translation import dictionary
    from transformer_iwslt import engine

    engine.load()
    from fairseq.models.roberta import RobertaModel, base_architecture

    sizes = {"encoder_embed_dim": EMBED, "encoder_ffn_embed_dim": FFN, "encoder_layers": LAYERS}
    none = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    args = Namespace(encoder_attention_heads=HEADS, tokens_per_sample=POSITIONS, **sizes, **none)
    base_architecture(args)
    model: Any = RobertaModel.build_model(args, SimpleNamespace(source_dictionary=dictionary(WORDS)))
    return model, lambda tokens, positions: model(tokens, masked_tokens=_mask(positions))[0]


def _mask(positions: Tensor) -> Tensor:
    """(batch, length), True at the given positions (batch, predictions), which are in ascending order."""
    return torch.zeros(BATCH, LENGTH, dtype=torch.bool).scatter(1, positions, True)


def training_step(model: nn.Module, logits: Logits, decay: FrobeniusDecay | None = None) -> Call:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, WORDS, (BATCH, LENGTH), generator=generator)
    positions = torch.rand(BATCH, LENGTH, generator=generator).topk(PREDICTIONS).indices.sort().values
    targets = torch.randint(5, WORDS, (BATCH * PREDICTIONS,), generator=generator)
    groups = param_groups(model, weight_decay=WEIGHT_DECAY, decay=decay)
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(logits(tokens, positions), targets).backward()
        if decay is not None:
            decay.step(LR)
        optimizer.step()

    return step


def main() -> None:
    parser = arguments(__doc__, repeats=9)
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models: dict[str, tuple[nn.Module, Call]] = {}
    decays: dict[str, Call] = {}
    for name, options in OURS.items():
        torch.manual_seed(0)
        model = MaskedLanguageModel(EncoderConfig(WORDS, EMBED, FFN, LAYERS, HEADS, max_positions=POSITIONS, **options))
        decay = None
        if "decay" in name:
            decay = frobenius_decay(model, WEIGHT_DECAY, "layers" in name, True, True, decoupled=True)
            assert decay is not None
            decays[name] = lambda decay=decay: decay.step(LR)
        models[name] = model, training_step(model, model, decay)
    others = {"fairseq": ("RoBERTa", fairseq_roberta), "transformers": ("BertForMaskedLM", transformers_bert)}
    for package, (name, make) in others.items():
        if find_spec(package) is None:
            print(f"{package}'s {name} is left out: {package} is not installed")
            continue
        model, logits = make()
        models[f"{package}'s {name}"] = model, training_step(model.train(), logits)
    alone = {f"{name}: decay": call for name, call in decays.items()}
    seconds = interleaved({name: step for name, (_, step) in models.items()} | alone, args.repeats)
    lines = []
    for name, (model, _) in models.items():
        speed = [f"{BATCH * LENGTH / statistics.median(seconds[name]):,.0f}", f"{ratio(seconds[FIRST], seconds[name]):.2f}"]
        share = f"{ratio(seconds[f'{name}: decay'], seconds[name]):.1%}" if name in decays else ""
        lines.append([name, f"{count_parameters(model):,}", spread(seconds[name]), *speed, share])
    header = ["model", "parameters", "ms a step, median (range)", "tokens / s", "times our dense speed", "of it decay"]
    show(args, f"Masked pre-training, {BATCH} sequences of {LENGTH} tokens, {PREDICTIONS} predictions each", header, lines)


if __name__ == "__main__":
    main()
