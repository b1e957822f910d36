"""Select the layers that surgery replaces: candidates, the caller's selection, and reasons not to replace a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from . import donors
from .attention import UnpackedMultiheadAttention
from .donors import Refusal
from .layers import Factorized

FilterFn = Callable[[nn.Module, str], bool]
Unsupported = Literal["raise", "skip"]
Donors = dict[str, nn.Module]  # by the first of their names; if several, they share one weight


@dataclass(frozen=True)
class SkippedLayer:
    """A selected layer that was left dense, and the reason."""

    name: str
    reason: str


class Selection(NamedTuple):
    """The layers to replace.

    tied:      groups of donors that share a weight. Most groups have one donor.
    skipped:   selected layers that are unsupported.
    unpacked:  replacements of torch's attentions whose input projections are among the donors.
    """

    tied: list[Donors]
    skipped: list[SkippedLayer]
    unpacked: dict[nn.MultiheadAttention, nn.Module]

    def names(self) -> list[str]:
        return [name for group in self.tied for name in group]


def select(model: nn.Module, filter_fn: FilterFn | None, unsupported: Unsupported) -> Selection:
    """Select and check the donors. Raises ValueError if there are none or, with "raise", if one is unsupported."""
    if unsupported not in ("raise", "skip"):
        raise ValueError(f"unsupported must be 'raise' or 'skip', got {unsupported!r}")
    candidates, refusals, unpacked = _candidates(model)
    selected = {n: m for n, m in candidates.items() if filter_fn is None or filter_fn(m, n)}
    if "" in selected or any(parent is model and _projections(name, selected) for name, parent in unpacked):
        raise ValueError(f"cannot replace the model itself in place: put the {type(model).__name__} inside a container")
    skipped = []

    def skip(name: str, refusal: Refusal) -> None:
        if unsupported == "raise":
            raise ValueError(f"cannot factorize {name!r}: {refusal.reason}; {refusal.remedy}")
        skipped.append(SkippedLayer(name, refusal.reason))
        del selected[name]

    for name, module in list(selected.items()):
        if refusal := refusals.get(name) or donors.refusal(module):
            skip(name, refusal)
    groups: dict[int, Donors] = {}
    for name, module in selected.items():
        groups.setdefault(id(module.weight), {})[name] = module
    owners = _owners(model)
    for group in list(groups.values()):
        for name, refusal in _tie_refusals(group, owners).items():
            skip(name, refusal)
            del group[name]
    tied = [group for group in groups.values() if group]
    if not tied:
        already = sum(isinstance(module, Factorized) for module in model.modules())
        reason = f"; {len(skipped)} are not supported, such as {skipped[0].name!r}: {skipped[0].reason}" if skipped else ""
        raise ValueError(
            f"nothing to factorize in {type(model).__name__}: of {len(candidates)} Linear, convolution and Embedding layers "
            f"filter_fn selected {len(skipped) or 'none'} ({already} layers are already factorized){reason}"
        )
    used = {parent: made for (name, parent), made in unpacked.items() if _projections(name, selected)}
    return Selection(tied, skipped, used)


def _projections(attention: str, names: Donors) -> list[str]:
    """The names that are input projections of an attention."""
    prefix = f"{attention}." if attention else ""
    return [f"{prefix}{part}" for part in donors.PROJECTIONS if f"{prefix}{part}" in names]


def _candidates(model: nn.Module) -> tuple[Donors, dict[str, Refusal], dict[tuple[str, nn.MultiheadAttention], nn.Module]]:
    """Layers with a weight to factorize, reasons not to replace some of them, and torch's attentions, unpacked."""
    found: Donors = {}
    refusals: dict[str, Refusal] = {}
    unpacked: dict[tuple[str, nn.MultiheadAttention], nn.Module] = {}
    owners = _owners(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, UnpackedMultiheadAttention):
            refusal = donors.attention_refusal(module)
            weights = [] if refusal else [getattr(module, key) for key in donors.projection_weights(module)]
            shared = [owner for weight in weights for owner in owners[id(weight)] if owner != name]
            if refusal or shared:
                found[name] = module
                refusals[name] = refusal or Refusal(f"its weight is tied to {shared[0]!r}")
            else:
                unpacked[name, module] = made = donors.unpack(module)
                found |= {f"{name}.{part}".lstrip("."): getattr(made, part) for part in donors.PROJECTIONS}
        elif donors.is_candidate(module):
            found[name] = module
    names = {module: [name] for name, module in found.items()}
    names |= {attention: [f"{name}.{part}".lstrip(".") for part in donors.PROJECTIONS] for name, attention in unpacked}
    registered = set(model.modules())
    remedy = "register it (nn.ModuleList, nn.ModuleDict) or exclude it with filter_fn"
    for place, held in held_modules(model):
        for inner, module in held.named_modules():
            if module in names and (module is held or held not in registered):
                reason = f"{place} holds it outside the registered modules and would keep it"
                refusals |= dict.fromkeys(names[module], Refusal(reason, remedy))
            elif module not in registered and donors.is_candidate(module):
                name = f"{place}.{inner}" if inner else place
                found[name], names[module] = module, [name]
                refusals[name] = Refusal("it is held outside the registered modules", remedy)
    return found, refusals, unpacked


def held_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules held by attributes outside the registered modules, for instance in a plain list. Yields place and module."""
    registers = set(vars(nn.Module()))
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in registers:
                yield from _modules_in(value, f"{name}.{attribute}".lstrip("."))


def refuse_held(model: nn.Module, verb: str, modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if an attribute holds one of the modules outside the registered modules."""
    held = {module: place for place, module in held_modules(model)}
    for name, module in modules.items():
        if module in held:
            reason = f"{held[module]} holds it outside the registered modules and would keep it"
            raise ValueError(f"cannot {verb} {name!r}: {reason}; register it (nn.ModuleList, nn.ModuleDict)")


def _modules_in(value: object, place: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield place, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _modules_in(each, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple | set):
        for index, each in enumerate(value):
            yield from _modules_in(each, f"{place}[{index}]")


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that own each Parameter, by the id of the Parameter."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _tie_refusals(group: Donors, owners: Mapping[int, list[str]]) -> dict[str, Refusal]:
    """Refuse donors of one weight if it also has an owner that is not replaced, or donors that use it differently."""
    first, *others = group
    weight = group[first].weight
    for owner in owners.get(id(weight), []):
        if owner not in group:
            refusal = Refusal(f"its weight is tied to {owner!r}", "untie it, select both or exclude it with filter_fn")
            return dict.fromkeys(group, refusal)
    for name in others:
        if donors.unrolling(group[name]) != donors.unrolling(group[first]):
            return dict.fromkeys(group, Refusal(f"its weight is tied to {name!r}, which uses it differently", "untie it"))
    return {}
