"""Load the encoder and the tokenizer of a checkpoint of train.py, and related helpers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bert_pretraining.model import MaskedLanguageModel, from_checkpoint
from bert_pretraining.text import PAD, TOKENIZER, load_tokenizer
from bert_pretraining.train import check_pretraining
from common.experiments import checkpoints
from common.experiments.files import digest


def load(path: Path, *, pretraining: str | None = None, **changes: Any) -> tuple[MaskedLanguageModel, Any]:
    """The encoder of a checkpoint, and the tokenizer beside it.

    If ``pretraining`` is given, it is the hash that the checkpoint's configuration must have. ``changes`` replace fields of the
    architecture, such as dropout. Raises ValueError if the file, its configuration, its tokenizer or its weights are wrong.
    """
    state = checkpoints.load(path)
    for key in ("architecture", "model", "tokenizer", "config"):
        if key not in state:
            raise ValueError(f"{path} is not a checkpoint of bert_pretraining/train.py: it has no {key!r}")
    check_pretraining(state, path, pretraining)
    beside = path.parent / TOKENIZER
    if not beside.exists():
        raise ValueError(f"there is no {TOKENIZER} beside {path}: copy that of the corpus it was trained on")
    if digest(beside) != state["tokenizer"]:
        raise ValueError(
            f"{beside} has the digest {digest(beside)}, but {path} was trained with {state['tokenizer']}: copy that tokenizer"
        )
    model = from_checkpoint({**state["architecture"], **changes}, checkpoints.model_state(state, path))
    return model, load_tokenizer(beside)


def pad(sequences: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sequences of tokens as (batch, length), padded on the right, and a mask that is True where there is a token."""
    lengths = np.array([len(each) for each in sequences])
    tokens = np.full((len(sequences), lengths.max()), PAD, np.int64)
    for row, each in zip(tokens, sequences, strict=True):
        row[: len(each)] = each
    words = np.arange(tokens.shape[1]) < lengths[:, None]
    return torch.from_numpy(tokens).to(device), torch.from_numpy(words).to(device)


def parameters(model: MaskedLanguageModel, more: int = 0) -> dict[str, Any]:
    """Numbers of parameters for a result, of the encoder and of its full-width form. ``more`` of a last layer count in both."""
    compressed, original = model.report.compressed + more, model.report.original + more
    return {"original": original, "compressed": compressed, "ratio": compressed / original}
