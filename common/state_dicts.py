"""State dicts as other programs save them: nested in a dictionary, or with the prefixes of wrappers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

KEYS = ("model", "state_dict", "model_state_dict", "net", "network")  # keys under which checkpoints store a model's state dict
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel and AveragedModel, torch.compile, and Lightning
_COUNT = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


def find(state: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """The tensors of a model's state dict, which may be nested in dictionaries under any of KEYS.

    Versions of modules (``_metadata``), which torch's ``load_state_dict`` reads, are kept.
    Raises ValueError, naming the keys found, if there is no state dict.
    """
    outer = list(state)
    while (key := next((key for key in KEYS if isinstance(state.get(key), Mapping)), None)) is not None:
        state = state[key]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and isinstance(name, str)}
    if not tensors or len(tensors) != len(state):
        strange = ", ".join(map(repr, [name for name in state if name not in tensors][:5] or outer[:5])) or "nothing"
        raise ValueError(f"it is not a model's state dict and has none under {', '.join(map(repr, KEYS))}: it has {strange}")
    return _state_dict(tensors, getattr(state, "_metadata", None))


def _state_dict(tensors: Mapping[str, Tensor], versions: Any) -> OrderedDict[str, Tensor]:
    found: Any = OrderedDict(tensors)
    if versions is not None:
        found._metadata = versions
    return found


def unwrap(state: Mapping[str, Any], own: Iterable[str]) -> OrderedDict[str, Tensor]:
    """The tensors of a model's state dict, as :func:`find` returns them, without the PREFIXES of wrappers.

    A prefix is removed, repeatedly, while all names in the state dict have it and not all of the model's ``own`` names do.
    The counter of AveragedModel is removed too, unless it is among ``own``.
    """
    tensors, kept = find(state), list(own)
    if len(tensors) > 1 and _COUNT not in kept:
        tensors.pop(_COUNT, None)
    while prefix := next((p for p in PREFIXES if _common(p, tensors) and not _common(p, kept)), None):
        versions = getattr(tensors, "_metadata", None)
        if versions is not None:  # by names of modules: the wrapped model, "module", becomes ""
            inside = ((f"{name}.", value) for name, value in versions.items() if f"{name}.".startswith(prefix))
            versions = OrderedDict((name.removeprefix(prefix).removesuffix("."), value) for name, value in inside)
        tensors = _state_dict({name.removeprefix(prefix): value for name, value in tensors.items()}, versions)
    return tensors


def _common(prefix: str, names: Iterable[str]) -> bool:
    """Whether there is at least one name and all names have the prefix."""
    found = list(names)
    return bool(found) and all(name.startswith(prefix) for name in found)
