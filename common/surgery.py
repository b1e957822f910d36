"""Model surgery: replace ordinary layers with factorized ones in place, and fold them back."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import donors, linalg, replaced
from .attention import UnpackedMultiheadAttention
from .budget import closest_index, count_parameters, least_ratio, step_midpoints
from .donors import RankOf
from .layers import Contraction, Factorized, FactorizedEmbedding, FactorizedMatrix
from .selection import Donors, FilterFn, SkippedLayer, Unsupported, refuse_held, select
from .state_dicts import unwrap

Init = Callable[[Tensor, int], Sequence[Tensor]]


@dataclass(frozen=True)
class LowRankConfig:
    """How to factorize layers. Raises ValueError if a value is out of range.

    rank_scale:    sets the rank of a convolution to ``max(1, round(rank_scale * out / groups * kh))`` and that of a linear
                   layer or embedding to ``max(1, round(rank_scale * min(rows, columns)))``. With 0, the layer stays dense.
                   Scales above 1 are overcomplete.
    rank_of:       the dimension that the rank scale multiplies: "released", as above and in the released code, or "min", the
                   smaller side of the unrolled weight for convolutions, too.
    init:          "spectral" is the truncated SVD of the donor's weight. "regular" draws each factor separately, with the
                   layer's ``reset_factors``. "kaiming" is an older name of "regular". "norm-matched" is regular, with all
                   factors of a layer then scaled by one number so that ||U V^T||_F is what spectral initialization gives for
                   the same donor. It controls the scale of the factors, not their balance. Or a function of the unrolled
                   weight (rows, columns) and the rank: it returns U (rows, rank) and V^T (rank, columns), with M
                   (rank, rank) between them at depth 3.
    depth:         2 for U V^T, 3 for U M V^T with M initialized to the identity.
    residual:      standard deviation of noise added to the initial M (depth 3 only).
    rank_pattern:  {regular expression: rank_scale} for layers whose whole name, such as "layer1.0.conv2", matches the
                   expression (``re.fullmatch``). If several match, the first one counts.
    contraction:   see :class:`FactorizedConv2d`.
    """

    rank_scale: float
    init: Literal["spectral", "regular", "norm-matched", "kaiming"] | Init = "spectral"
    depth: int = 2
    residual: float = 0.0
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    contraction: Contraction = "auto"
    rank_of: RankOf = "released"

    def __post_init__(self) -> None:
        for pattern in self.rank_pattern:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rank_pattern needs regular expressions, got {pattern!r}: {error}") from error
        for name, scale in {"rank_scale": self.rank_scale, **self.rank_pattern}.items():
            if not isinstance(scale, Real) or not math.isfinite(scale) or scale < 0:
                raise ValueError(
                    f"a rank scale must be a number, finite and not negative (0 keeps layers dense), got {scale!r} for {name!r}"
                )
        if self.rank_of not in ("released", "min"):
            raise ValueError(f"rank_of must be 'released' or 'min', got {self.rank_of!r}")
        if not callable(self.init) and self.init not in ("spectral", "regular", "norm-matched", "kaiming"):
            names = "'spectral', 'regular' (or 'kaiming', its older name), 'norm-matched'"
            raise ValueError(f"init must be {names} or a function, got {self.init!r}")
        if self.depth not in (2, 3):
            raise ValueError(f"depth must be 2 (U V^T) or 3 (U M V^T), got {self.depth}")
        if not math.isfinite(self.residual) or self.residual < 0 or (self.residual and self.depth == 2):
            raise ValueError(
                f"residual must be finite, not negative, and 0 at depth 2, got {self.residual} at depth {self.depth}"
            )

    def scale_for(self, name: str) -> float:
        """Rank scale of the layer with this name."""
        return next((s for pattern, s in self.rank_pattern.items() if re.fullmatch(pattern, name)), self.rank_scale)


@dataclass(frozen=True)
class LayerReport:
    """One factorized layer: shape of its dense weight, rank, and number of parameters (with bias) before and after."""

    name: str
    shape: tuple[int, ...]
    rank: int
    parameters_before: int
    parameters_after: int

    @property
    def grows(self) -> bool:
        return self.parameters_after > self.parameters_before


@dataclass(frozen=True)
class FactorizationReport:
    """Result of a factorization: the layers, the model's number of parameters before and after, and the layers left dense.

    A weight shared by tied layers is counted in the row of each layer, but only once in the counts of the model.
    """

    layers: tuple[LayerReport, ...]
    original: int
    compressed: int
    skipped: tuple[SkippedLayer, ...] = ()

    @classmethod
    def dense(cls, model: nn.Module) -> FactorizationReport:
        """The report of a model that is left dense."""
        count = count_parameters(model)
        return cls((), original=count, compressed=count)

    @property
    def ratio(self) -> float:
        return self.compressed / self.original

    @property
    def growing(self) -> tuple[LayerReport, ...]:
        """The layers with more parameters than before."""
        return tuple(layer for layer in self.layers if layer.grows)

    def to_dict(self) -> dict[str, Any]:
        parameters = {"original": self.original, "compressed": self.compressed, "ratio": self.ratio}
        skipped = {"skipped": [asdict(layer) for layer in self.skipped]} if self.skipped else {}
        return {"layers": [asdict(layer) for layer in self.layers], "parameters": parameters, **skipped}

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'shape':<18} {'rank':>5} {'before':>10} {'after':>10}"]
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            before, after = layer.parameters_before, layer.parameters_after
            grows = "  grows" if layer.grows else ""
            lines.append(f"{layer.name:<{width}}  {shape:<18} {layer.rank:>5} {before:>10,} {after:>10,}{grows}")
        grows = " grows" if self.ratio > 1 else ""
        counts = f"{self.original:>10,} {self.compressed:>10,}  ({self.ratio:.2%}){grows}"
        lines.append(f"{'model':<{width}}  {'':<18} {'':>5} {counts}")
        return "\n".join([*lines, *(f"{layer.name}: left dense, {layer.reason}" for layer in self.skipped)])


def _rank(dimension: int, rank_scale: float) -> int:
    return max(1, round(rank_scale * dimension))


def _factor_numel(shape: tuple[int, ...], rank: int, depth: int) -> int:
    *groups, rows, columns = shape
    return math.prod(groups) * (rank * (rows + columns) + (rank * rank if depth == 3 else 0))


@torch.no_grad()
def _initialize(layer: FactorizedMatrix, donor: nn.Module, config: LowRankConfig) -> None:
    matrix = donors.unroll(donor)
    if isinstance(layer, FactorizedEmbedding) and layer.padding_idx is not None and not layer.padding_row_is_shared:
        matrix = matrix.index_fill(0, torch.tensor(layer.padding_idx, device=matrix.device), 0)
    init = config.init
    if callable(init):
        layer.set_factors(*_of_each_group(matrix, lambda each: init(each, layer.rank)))
    elif init == "spectral":
        layer.set_factors(*_of_each_group(matrix, lambda each: _spectral(each, layer.rank, layer.depth)))
    elif init in ("regular", "kaiming", "norm-matched"):
        layer.reset_factors()
    else:
        raise AssertionError(f"no initialization is written for {init!r}")
    if config.residual:
        layer.m.add_(torch.randn_like(layer.m), alpha=config.residual)
    if init == "norm-matched":
        spectral = _of_each_group(matrix, lambda each: linalg.spectral_init(each, layer.rank))
        norm = linalg.frobenius_norm([linalg.to_float64(factor) for factor in spectral])
        layer.set_factors(*linalg.rescale(layer.factors(), norm))


def _spectral(matrix: Tensor, rank: int, depth: int) -> tuple[Tensor, ...]:
    u, vt = linalg.spectral_init(matrix, rank)
    return (u, torch.eye(rank), vt) if depth == 3 else (u, vt)


def _of_each_group(matrix: Tensor, factors: Callable[[Tensor], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The factors of a matrix. With groups, the factors of each group's matrix are stacked."""
    if matrix.ndim == 2:
        return factors(matrix)
    return [torch.stack(column) for column in zip(*map(factors, matrix), strict=True)]


def _tie(layers: Sequence[FactorizedMatrix]) -> FactorizedMatrix:
    """Make layers with a tied weight share the factors of one of them. Returns that layer.

    A layer that uses all rows is preferred: one that is not an embedding, or an embedding without a padding row. A padding row
    stays zero only if it is that of all layers.
    """
    padding = {layer: getattr(layer, "padding_idx", None) for layer in layers}
    first = next((layer for layer in layers if padding[layer] is None), layers[0])
    for layer in layers:
        if isinstance(layer, FactorizedEmbedding) and len({*padding.values()}) > 1:
            layer.padding_row_is_shared = True
        layer.u, layer.vt = first.u, first.vt
        if layer.depth == 3:
            layer.m = first.m
    return first


def _replace(model: nn.Module, *steps: Mapping[Any, nn.Module]) -> None:
    """Replace modules wherever they are registered, including shared modules. Steps are applied in order."""
    before = dict(model.named_parameters())
    for replacements in steps:
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child is not None and child in replacements:
                    parent._modules[key] = replacements[child]
    kept = set(map(id, model.parameters()))
    replaced.remember({name: parameter for name, parameter in before.items() if id(parameter) not in kept})


def _refuse_wrapped(model: nn.Module, verb: str) -> None:
    """Raise ValueError if a wrapper in the model trains it on several processes."""
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"):
                where = f"{name!r}" if name else "the model"
                consequence = "it would not know the new Parameters, so its processes would diverge"
                raise ValueError(f"cannot {verb} inside {kind.__name__} ({where}): {consequence}; {verb} first, then wrap")


def _report(
    model: nn.Module,
    layers: Mapping[str, tuple[nn.Module, FactorizedMatrix]],
    original: int,
    skipped: Sequence[SkippedLayer] = (),
) -> FactorizationReport:
    rows = tuple(
        LayerReport(name, donors.weight_shape(donor), layer.rank, count_parameters(donor), count_parameters(layer))
        for name, (donor, layer) in layers.items()
    )
    return FactorizationReport(rows, original, count_parameters(model), tuple(skipped))


def factorize_(
    model: nn.Module,
    config: LowRankConfig,
    *,
    filter_fn: FilterFn | None = None,
    unsupported: Unsupported = "raise",
    skip_growing: bool | None = None,
) -> FactorizationReport:
    """Replace the selected layers of a model with factorized ones, in place.

    Supported layers are Linear, Conv1d, Conv2d, Embedding, transformers' Conv1D and the input projections of torch's
    MultiheadAttention, which become the layers ``q_proj``, ``k_proj`` and ``v_proj``. The groups of a convolution are
    factorized separately. Layers that share one weight, such as an embedding and the output projection, share its factors.

    ``filter_fn(module, name)`` returns whether to replace a layer. Without it, every supported layer is selected. Other layers
    do not change. Selected layers keep bias, stride, padding, dilation, device, dtype, mode, requires_grad, forward and
    backward hooks, and any attributes, buffers and modules added to them. The padding row of an embedding becomes zero, unless
    a layer with the same weight uses it. Call this before creating the optimizer, because the factors are new Parameters, and
    before wrapping the model in DistributedDataParallel or sharding it.

    unsupported:   "raise" raises for a selected layer that cannot be factorized. "skip" leaves it dense, and the report says
                   why.
    skip_growing:  whether layers stay dense if they would have more parameters than before. None factorizes them and warns.
                   False factorizes them without a warning, for models that are overcomplete on purpose.

    Raises ValueError, with the model unchanged, if nothing is selected, if an entry of ``config.rank_pattern`` matches no
    selected layer, or if a selected layer is unsupported: a transposed or three-dimensional convolution, or a layer that is
    lazy, quantized, parametrized, of a class that overrides forward, or tied to a layer that is not selected.
    """
    if not isinstance(config, LowRankConfig):
        raise TypeError(f"factorize_ takes a LowRankConfig, got {config!r}: pass LowRankConfig(rank_scale=...)")
    _refuse_wrapped(model, "factorize")
    selection = select(model, filter_fn, unsupported)
    names, skipped = selection.names(), list(selection.skipped)
    for pattern in config.rank_pattern:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(
                f"rank_pattern {pattern!r} matches none of the {len(names)} selected layers, such as {names[0]!r}: it must "
                "match a layer's whole name, as in '.*conv2'"
            )
    original = count_parameters(model)
    layers: dict[str, tuple[nn.Module, FactorizedMatrix]] = {}
    kept: list[SkippedLayer] = []
    for group in selection.tied:
        scale = _scale(group, config)
        if scale == 0:
            kept += [SkippedLayer(name, "its rank scale is 0") for name in group]
            continue
        donor = next(iter(group.values()))
        _check_values(donor, next(iter(group)), config)
        rank = _rank(donors.rank_dimension(donor, config.rank_of), scale)
        before, after = donors.numel(donor), _factor_numel(donors.shape(donor), rank, config.depth)
        if skip_growing and after > before:
            reason = f"rank {rank} would need {after:,} parameters instead of {before:,}"
            skipped += [SkippedLayer(name, reason) for name in group]
            continue
        made = {name: donors.skeleton(module, rank, config.depth, config.contraction) for name, module in group.items()}
        _initialize(_tie(list(made.values())), donor, config)
        layers |= {name: (module, made[name]) for name, module in group.items()}
    replacements = dict(layers.values())
    unpacked = {old: new for old, new in selection.unpacked.items() if any(child in replacements for child in new.children())}
    _replace(model, unpacked, replacements)
    report = _report(model, layers, original, [*skipped, *(kept if layers else [])])
    if skip_growing is None and report.growing:
        warnings.warn(
            f"{len(report.growing)} of {len(report.layers)} layers have more parameters than before, such as "
            f"{report.growing[0].name!r}, and the model has {report.ratio:.2f} times as many: pass skip_growing=True to leave "
            "such layers dense, or False to silence this warning",
            stacklevel=2,
        )
    return report


def _check_values(donor: nn.Module, name: str, config: LowRankConfig) -> None:
    """Raise ValueError, naming the layer, if its weight has no values or values that are not finite."""
    weight = donor.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        if config.init in ("spectral", "norm-matched"):
            raise ValueError(
                f"cannot compute factors from the weight of {name!r}: it is on the meta device and has no values; load weights "
                "first, or use init='regular' and initialize the model after to_empty"
            )
    elif not weight.isfinite().all():
        raise ValueError(f"cannot factorize {name!r}: its weight contains NaN or infinite values")


def _scale(group: Donors, config: LowRankConfig) -> float:
    """The rank scale of layers that share one weight."""
    scales = {name: config.scale_for(name) for name in group}
    if len(set(scales.values())) > 1:
        raise ValueError(f"layers that share a weight must have the same rank scale, but rank_pattern gives {scales}")
    return next(iter(scales.values()))


def load_factorized_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> FactorizationReport:
    """Load a state dict into a model, in place. Layers that the state dict holds as factors are first replaced.

    ``model`` is the dense architecture. Ranks and depth come from the shapes in the state dict, so a factorized model can be
    rebuilt from its checkpoint alone. A dense state dict is loaded without replacing layers. Prefixes of wrappers such as
    DataParallel are removed (:func:`common.state_dicts.unwrap`). As in ``load_state_dict``, the state dict may lack
    ``num_batches_tracked`` of all normalizations, which torch introduced in 0.4.1. A model on the meta device gets the tensors
    of the state dict themselves. Raises ValueError, naming the first mismatch, with the model unchanged.
    """
    if not isinstance(state_dict, Mapping):
        advice = "its state_dict()" if isinstance(state_dict, nn.Module) else "torch.load(path)"
        raise TypeError(f"load_factorized_ takes a state dict, got a {type(state_dict).__name__}: pass {advice}")
    _refuse_wrapped(model, "load")
    state_dict = unwrap(state_dict, model.state_dict())
    original = count_parameters(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    expected = dict(model.state_dict())
    unpacked: dict[nn.Module, nn.Module] = {}
    for name, module in list(modules.items()):
        packed = isinstance(module, nn.MultiheadAttention) and not isinstance(module, UnpackedMultiheadAttention)
        if packed and f"{name}.q_proj.weight" not in expected:
            children = [f"{name}.{part}" for part in donors.PROJECTIONS]
            if any(f"{child}.vt" in state_dict for child in children):
                if module not in unpacked:
                    if refusal := donors.attention_refusal(module):
                        raise ValueError(f"cannot factorize {name!r}: {refusal.reason}; {refusal.remedy}")
                    unpacked[module] = donors.unpack(module)
                for key in donors.projection_weights(module):
                    del expected[f"{name}.{key}"]
                modules |= {
                    child: unpacked[module].get_submodule(part)
                    for child, part in zip(children, donors.PROJECTIONS, strict=True)
                }
                expected |= {f"{child}.weight": modules[child].weight for child in children}
    layers: dict[str, tuple[nn.Module, FactorizedMatrix]] = {}
    made: dict[nn.Module, FactorizedMatrix] = {}  # a module that is used twice becomes one factorized layer that is used twice
    for name, donor in modules.items():
        if f"{name}.vt" in state_dict and donors.kind_of(donor) is not None:
            if donor not in made:
                if refusal := donors.refusal(donor):
                    raise ValueError(f"cannot factorize {name!r}: {refusal.reason}; {refusal.remedy}")
                rank, depth = state_dict[f"{name}.vt"].shape[-2], 3 if f"{name}.m" in state_dict else 2
                made[donor] = donors.skeleton(donor, rank, depth, "auto")
                layers[name] = (donor, made[donor])
            del expected[f"{name}.weight"]
            expected |= {f"{name}.{key}": value for key, value in made[donor].state_dict().items()}
    counts = {key: torch.zeros_like(value) for key, value in expected.items() if key.endswith("num_batches_tracked")}
    if not any(key in state_dict for key in counts):
        state_dict |= counts
    for key in [*expected, *state_dict]:
        if key not in state_dict or key not in expected:
            side = "the checkpoint lacks" if key in expected else "the model lacks"
            raise ValueError(f"the checkpoint does not fit this {type(model).__name__}: {side} {key!r}")
        given, wanted = tuple(state_dict[key].shape), tuple(expected[key].shape)
        if given != wanted:
            raise ValueError(
                f"the checkpoint does not fit this {type(model).__name__}: {key!r} has shape {given}, expected {wanted}"
            )
    changed: dict[str, nn.Module] = {name: donor for name, (donor, _) in layers.items()}
    refuse_held(model, "load", changed | {name: module for name, module in modules.items() if module in unpacked})
    tied: dict[int, list[FactorizedMatrix]] = {}
    for donor, layer in layers.values():
        tied.setdefault(id(donor.weight), []).append(layer)
    for group in tied.values():
        _tie(group)
    _replace(model, unpacked, dict(layers.values()))
    if any(each.is_meta for each in (*model.parameters(), *model.buffers())):
        _assign(model, state_dict)
    else:
        model.load_state_dict(state_dict)
    return _report(model, layers, original)


def _assign(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Assign the tensors of a state dict to a model on the meta device. Parameters that modules share stay shared."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, key))
    model.load_state_dict(state_dict, assign=True)
    for (owner, name), *others in places.values():
        for module, key in others:
            module._parameters[key] = owner._parameters[name]


def densify_(model: nn.Module) -> list[str]:
    """Fold every factorized layer back into an ordinary layer with the same function, in place. Returns the layers' names.

    Layers keep their hooks and anything added to them. Layers that share factors share the new weight. torch's attention is
    packed again. Raises ValueError, with the model unchanged, if there is no factorized layer, or if folding would lose a
    change that was made to a layer.
    """
    _refuse_wrapped(model, "densify")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Factorized)}
    if not layers:
        raise ValueError(f"nothing to fold: {type(model).__name__} has no factorized layer")
    if "" in layers:
        raise ValueError(f"cannot replace the model itself in place: use its to_layer() ({type(model).__name__})")
    attentions = {name: m for name, m in model.named_modules() if isinstance(m, UnpackedMultiheadAttention)}
    refuse_held(model, "fold", layers | attentions)
    for name, module in (layers | attentions).items():
        if refusal := donors.altered(module):
            raise ValueError(f"cannot fold {name!r}: {refusal.reason}; undo that first")
    folded: dict[nn.Module, nn.Module] = {}
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    for layer in layers.values():
        dense = folded[layer] = donors.fold(layer)
        key = tuple(map(id, layer.factors()))
        if key in weights:
            dense.weight = weights[key]
        elif isinstance(dense.weight, nn.Parameter):
            weights[key] = dense.weight
    _replace(model, folded)
    _replace(model, {unpacked: donors.pack(unpacked) for unpacked in attentions.values()})
    return list(layers)


def rank_scale_for_ratio(
    model: nn.Module,
    target: float,
    *,
    filter_fn: FilterFn | None = None,
    depth: int = 2,
    rank_pattern: Mapping[str, float] | None = None,
    rank_of: RankOf = "released",
    unsupported: Unsupported = "raise",
    skip_growing: bool = False,
) -> float:
    """The rank scale at which the factorized model's number of parameters is closest to ``target`` times that of the model.

    Only shapes are read. Ranks are integers, so the number is a step function of the scale. The result is the midpoint of the
    best step. ``rank_pattern`` fixes the scale of some layers, and ``rank_of`` is the dimension that scales multiply, as in
    :class:`LowRankConfig`. ``unsupported`` and ``skip_growing`` are as in :func:`factorize_`.

    Raises ValueError if the target is not positive and finite, if it is above 1 with ``skip_growing``, if every selected layer
    has a fixed scale, or if the target is below the ratio that rank 1 everywhere gives. The message then names that floor and
    the largest Parameter that stays dense.
    """
    if not math.isfinite(target) or target <= 0:
        raise ValueError(f"target ratio must be positive and finite, got {target}")
    if skip_growing and target > 1:
        raise ValueError(f"target ratio {target} is above 1, but with skip_growing no layer grows: leave out skip_growing")
    fixed = LowRankConfig(0, depth=depth, rank_pattern=rank_pattern or {}, rank_of=rank_of)
    selection = select(model, filter_fn, unsupported)
    original = count_parameters(model)
    Step = tuple[tuple[int, ...], int, int]  # matrix shape, rank dimension, parameters of the dense weight
    free: dict[Step, int] = {}  # number of such layers

    def parameters(step: Step, scale: float) -> int:
        shape, dimension, dense = step
        found = _factor_numel(shape, _rank(dimension, scale), depth)
        return min(found, dense) if skip_growing else found

    rest, weights = original, set()
    for group in selection.tied:
        donor = next(iter(group.values()))
        weights.add(id(donor.weight))
        step = donors.shape(donor), donors.rank_dimension(donor, rank_of), donors.numel(donor)
        rest -= step[2]
        if any(re.fullmatch(pattern, name) for pattern in fixed.rank_pattern for name in group):
            scale = _scale(group, fixed)
            rest += parameters(step, scale) if scale else step[2]
        else:
            free[step] = free.get(step, 0) + 1
    if not free:
        raise ValueError("rank_pattern fixes the rank scale of every selected layer: leave at least one layer free")

    def count(scale: float) -> int:
        return rest + sum(n * parameters(step, scale) for step, n in free.items())

    floor = count(0)
    if target * original < floor * (1 - 1e-9):
        for attention in selection.unpacked:
            weights |= {id(getattr(attention, name)) for name in donors.projection_weights(attention)}
        dense = [(p.numel(), n) for n, p in model.named_parameters() if id(p) not in weights]
        largest = f"; {max(dense)[1]!r} keeps {max(dense)[0]:,} of them dense" if dense else ""
        raise ValueError(
            f"target ratio {target} is below the floor: rank 1 everywhere leaves {floor:,} of {original:,} parameters, "
            f"a ratio of {least_ratio(floor, original):g}{largest}"
        )
    wanted = target * original
    limit = 1
    while count(limit) < wanted and limit < 2**60:
        limit *= 2
    # Find the nearest integer scale, then search the steps around it: below an overcomplete scale there may be very many.
    whole = closest_index(count, 0, limit, wanted)
    scales = step_midpoints((dimension for _, dimension, _ in free), max(0, whole - 2), whole + 2)
    return scales[closest_index(lambda step: count(scales[step]), 0, len(scales) - 1, wanted)]
