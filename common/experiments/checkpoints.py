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

from ..state_dicts import find
from .files import write_atomic

FORMAT = 1  # of training checkpoints; what an older one lacks, those who read it add
LATEST, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"


def save_file(path: Path, state: Mapping[str, Any], *, keep: Path | None = None) -> None:
    """Write a dictionary of tensors and plain values atomically; what was there before moves to ``keep``, if given."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomic(path, buffer.getvalue(), keep=keep)


def save(directory: Path, state: Mapping[str, Any]) -> None:
    """Write the latest checkpoint of a run; the one before it is kept."""
    save_file(directory / LATEST, state, keep=directory / PREVIOUS)


def load(path: Path) -> dict[str, Any]:
    """Content of a checkpoint, on the CPU; raises ValueError where it is missing, damaged or would run code.

    Of a folder it is the newest good checkpoint.
    """
    if path.is_dir():
        found = newest(path)
        if found is None:
            raise ValueError(f"{path} is a folder without a checkpoint that loads: give a file, or the folder of a run")
        return found
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    try:
        if zipfile.is_zipfile(path):  # whose parts carry checksums, which torch does not look at; torch before 1.6 wrote no zip
            with zipfile.ZipFile(path) as packed:
                damaged = packed.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        foreign = "weights_only" in str(error)
        reason = "it holds objects whose loading could run code" if foreign else "it is damaged"
        raise ValueError(f"{path} is not a checkpoint that loads: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    format = state.get("format", FORMAT)  # files of other programs tell none
    if not isinstance(format, int) or format > FORMAT:
        raise ValueError(f"{path} is of format {format}, and this version reads up to {FORMAT}: use the version that wrote it")
    return state


def newest(directory: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run that loads, or None; says on stderr when it had to fall back."""
    for name in (LATEST, PREVIOUS):
        if (directory / name).exists():
            try:
                return load(directory / name)
            except ValueError as error:
                print(f"warning: {error}; looking for an older one", file=sys.stderr)
    return None


def model_state(state: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The model's state dict in a checkpoint, of this project or of another: as :func:`common.state_dicts.find` finds it.

    Masks of torch.nn.utils.prune are multiplied into their weights. Raises ValueError where there is none.
    """
    try:
        tensors = find(state)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of a model: {error}") from error
    for name in [name.removesuffix("_mask") for name in tensors if name.endswith("_mask")]:
        if f"{name}_orig" in tensors:
            tensors[name] = tensors.pop(f"{name}_orig") * tensors.pop(f"{name}_mask")
    return tensors


def random_state() -> dict[str, Any]:
    """State of Python's and torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
