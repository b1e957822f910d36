"""State dicts as other programs save them: inside a dictionary, and with the prefixes of wrappers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

KEYS = ("model", "state_dict", "model_state_dict", "net", "network")  # under which checkpoints keep a model's state dict
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel and AveragedModel, torch.compile, and Lightning
_COUNT = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


def find(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model's state dict, which may be in a dictionary under one of KEYS.

    Raises ValueError, naming the keys, where there is none.
    """
    outer = list(state)
    while (key := next((key for key in KEYS if isinstance(state.get(key), Mapping)), None)) is not None:
        state = state[key]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and isinstance(name, str)}
    if not tensors or len(tensors) != len(state):
        strange = ", ".join(map(repr, [name for name in state if name not in tensors][:5] or outer[:5])) or "nothing"
        raise ValueError(f"it holds no state dict of a model, alone or under {', '.join(map(repr, KEYS))}: it has {strange}")
    return tensors


def unwrap(state: Mapping[str, Any], own: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a model's state dict, as :func:`find` finds them, without the PREFIXES of wrappers.

    A prefix is removed where all names have it, again and again, but not one that all of the model's ``own`` names have.
    """
    tensors, kept = find(state), list(own)
    if len(tensors) > 1 and _COUNT not in kept:
        tensors.pop(_COUNT, None)
    while prefix := next((p for p in PREFIXES if _common(p, tensors) and not _common(p, kept)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _common(prefix: str, names: Iterable[str]) -> bool:
    """Whether there are names and all have the prefix."""
    found = list(names)
    return bool(found) and all(name.startswith(prefix) for name in found)
