"""Checkpoints: plain dictionaries of tensors and numbers, written atomically, loaded without unpickling code."""

from __future__ import annotations

import io
import random
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..state_dicts import find
from .files import write_atomic

FORMAT = 1  # version of the training checkpoint; code that reads an older checkpoint fills in the keys that it lacks
LATEST, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"


def save_file(path: Path, state: Mapping[str, Any], *, keep: Path | None = None) -> None:
    """Write a dictionary of tensors and plain values atomically. An existing file moves to ``keep``, if given."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomic(path, buffer.getvalue(), keep=keep)


def save(directory: Path, state: Mapping[str, Any]) -> None:
    """Write the latest checkpoint of a run, and keep the previous one."""
    save_file(directory / LATEST, state, keep=directory / PREVIOUS)


def load(path: Path) -> dict[str, Any]:
    """Content of a checkpoint, with its tensors on the CPU. For a folder, the newest checkpoint in it that loads.

    Raises ValueError if the checkpoint is missing, damaged or of a newer format, or if loading it could run code.
    """
    if path.is_dir():
        found = newest(path)
        if found is None:
            raise ValueError(f"{path} is a folder without a checkpoint that loads: give a checkpoint file or a run's folder")
        return found
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    try:
        if zipfile.is_zipfile(path):  # its members have checksums, which torch does not verify; torch before 1.6 wrote no zip
            with zipfile.ZipFile(path) as packed:
                damaged = packed.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        foreign = "weights_only" in str(error)
        reason = "it holds objects whose loading could run code" if foreign else "it is damaged"
        raise ValueError(f"cannot load {path} as a checkpoint: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    format = state.get("format", FORMAT)  # checkpoints of other programs have no format
    if not isinstance(format, int) or format > FORMAT:
        raise ValueError(f"{path} has format {format}, but this version reads up to {FORMAT}: use the version that wrote it")
    return state


def newest(directory: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run that loads, or None. Warns on stderr about each one that does not load."""
    for name in (LATEST, PREVIOUS):
        if (directory / name).exists():
            try:
                return load(directory / name)
            except ValueError as error:
                print(f"warning: {error}; looking for an older checkpoint", file=sys.stderr)
    return None


def model_state(state: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The model's state dict in a checkpoint of this or another project, as :func:`common.state_dicts.find` finds it.

    Masks of torch.nn.utils.prune are multiplied into their weights. Raises ValueError if there is no state dict.
    """
    try:
        tensors = find(state)
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint of a model: {error}") from error
    for name in [name.removesuffix("_mask") for name in tensors if name.endswith("_mask")]:
        if f"{name}_orig" in tensors:
            tensors[name] = tensors.pop(f"{name}_orig") * tensors.pop(f"{name}_mask")
    return tensors


def load_weights_(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict into the model that a checkpoint's architecture describes. Raises ValueError if it does not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's weights do not fit its architecture: {' '.join(str(error).split())}") from error


def random_state() -> dict[str, Any]:
    """State of the random generators of Python and torch."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
