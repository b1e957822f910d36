"""Model surgery: replace ordinary layers by factorized ones in place, and fold them back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import linalg
from .budget import closest_index, count_parameters, step_midpoints
from .layers import (
    Contraction,
    Factorized,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    FactorizedMatrix,
)
from .state_dicts import unwrap

FilterFn = Callable[[nn.Module, str], bool]
Init = Callable[[Tensor, int], Sequence[Tensor]]

Donor = nn.Linear | nn.Conv2d | nn.Embedding

_DONORS = (nn.Linear, nn.Conv2d, nn.Embedding)
_UNSUPPORTED = (nn.modules.conv._ConvNd, nn.EmbeddingBag)


@dataclass(frozen=True)
class LowRankConfig:
    """How to factorize a layer.

    rank_scale:    rank of a convolution is ``max(1, round(rank_scale * out * kh))``, of a linear layer or an embedding
                   ``max(1, round(rank_scale * min(rows, columns)))``. Above 1 is overcomplete; 0 keeps the layer dense.
    init:          "spectral" (truncated SVD of the donor's weight), "regular" (each factor drawn on its own, by the layer's
                   ``reset_factors``), "norm-matched" (regular, then all factors of a layer scaled alike so that
                   ||U V^T||_F is what spectral initialization gives for the same donor; it controls the scale, not the
                   balance of the factors), or a function of (unrolled weight, rank) that returns ``depth`` factors.
                   "kaiming" is an older name of "regular".
    depth:         2 for U V^T, 3 for U M V^T with M starting at the identity.
    residual:      standard deviation of noise added to the initial M (depth 3 only).
    rank_pattern:  {regular expression: rank_scale} for layers whose whole name matches; the first match wins.
    contraction:   see :class:`FactorizedConv2d`.
    """

    rank_scale: float
    init: Literal["spectral", "regular", "norm-matched", "kaiming"] | Init = "spectral"
    depth: int = 2
    residual: float = 0.0
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    contraction: Contraction = "auto"

    def __post_init__(self) -> None:
        for name, scale in {"rank_scale": self.rank_scale, **self.rank_pattern}.items():
            if not math.isfinite(scale) or scale < 0:
                raise ValueError(f"rank scale must be finite and not negative (0 keeps layers dense), got {scale} for {name!r}")
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
    """One factorized layer: shape of its dense weight, rank, and its parameters (bias included) before and after."""

    name: str
    shape: tuple[int, ...]
    rank: int
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class FactorizationReport:
    """What a factorization did: its layers, and the parameters of the whole model before and after."""

    layers: tuple[LayerReport, ...]
    original: int
    compressed: int

    @classmethod
    def dense(cls, model: nn.Module) -> FactorizationReport:
        """The report of a model that is left dense."""
        count = count_parameters(model)
        return cls((), original=count, compressed=count)

    @property
    def ratio(self) -> float:
        return self.compressed / self.original

    def to_dict(self) -> dict[str, Any]:
        parameters = {"original": self.original, "compressed": self.compressed, "ratio": self.ratio}
        return {"layers": [asdict(layer) for layer in self.layers], "parameters": parameters}

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'shape':<18} {'rank':>5} {'before':>10} {'after':>10}"]
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            before, after = layer.parameters_before, layer.parameters_after
            lines.append(f"{layer.name:<{width}}  {shape:<18} {layer.rank:>5} {before:>10,} {after:>10,}")
        lines.append(f"{'model':<{width}}  {'':<18} {'':>5} {self.original:>10,} {self.compressed:>10,}  ({self.ratio:.2%})")
        return "\n".join(lines)


def _matrix_shape(donor: Donor) -> tuple[int, int]:
    if isinstance(donor, nn.Conv2d):
        kh, kw = donor.kernel_size
        return donor.out_channels * kh, donor.in_channels * kw
    rows, columns = donor.weight.shape
    return rows, columns


def _rank_dimension(donor: Donor) -> int:
    """What rank_scale multiplies: the rows of a convolution, as in the released code, else the smaller dimension."""
    rows, columns = _matrix_shape(donor)
    return rows if isinstance(donor, nn.Conv2d) else min(rows, columns)


def _rank(dimension: int, rank_scale: float) -> int:
    return max(1, round(rank_scale * dimension))


def _factor_numel(shape: tuple[int, int], rank: int, depth: int) -> int:
    return rank * sum(shape) + (rank * rank if depth == 3 else 0)


def _checked(module: nn.Module, name: str) -> Donor:
    """The module, if it can be factorized; raises ValueError naming it and the limit otherwise."""
    kind = type(module).__name__
    remedy = "exclude it with filter_fn"
    if not isinstance(module, _DONORS) or getattr(module, "transposed", False):
        raise ValueError(f"cannot factorize {name!r}: {kind} is not a Linear, Conv2d or Embedding; {remedy}")
    base = next(donor for donor in _DONORS if isinstance(module, donor))
    if type(module).forward is not base.forward:
        raise ValueError(f"cannot factorize {name!r}: {kind} has a forward of its own; {remedy}")
    if parametrize.is_parametrized(module):
        raise ValueError(f"cannot factorize {name!r}: its weight is parametrized; remove the parametrization or {remedy}")
    if "weight" not in module._parameters:
        raise ValueError(f"cannot factorize {name!r}: a hook computes its weight (weight_norm, pruning); remove it or {remedy}")
    if isinstance(module.weight, nn.UninitializedParameter):
        raise ValueError(
            f"cannot factorize {name!r}: {kind} has no weight yet; run one batch through the model first or {remedy}"
        )
    if not module.weight.is_floating_point():
        raise ValueError(f"cannot factorize {name!r}: its weight is {module.weight.dtype}, not floating point; {remedy}")
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        raise ValueError(f"cannot factorize {name!r}: it has groups={module.groups}, and only groups=1 is supported; {remedy}")
    if isinstance(module, nn.Embedding):
        for option in ("sparse", "max_norm", "scale_grad_by_freq"):
            if getattr(module, option):
                raise ValueError(f"cannot factorize {name!r}: an embedding with {option} is not supported; {remedy}")
    return module


def _select(model: nn.Module, filter_fn: FilterFn | None) -> dict[str, Donor]:
    """The donors, by first name, each one checked; raises ValueError where there are none or one is unsupported."""
    candidates = {n: m for n, m in model.named_modules() if isinstance(m, (*_DONORS, *_UNSUPPORTED))}
    selected = {n: _checked(m, n) for n, m in candidates.items() if filter_fn is None or filter_fn(m, n)}
    if not selected:
        already = sum(isinstance(module, Factorized) for module in model.modules())
        raise ValueError(
            f"nothing to factorize in {type(model).__name__}: of {len(candidates)} Linear, convolution and Embedding layers "
            f"filter_fn selected none ({already} layers are factorized already)"
        )
    if "" in selected:
        raise ValueError(f"cannot replace the model itself in place: put the {type(model).__name__} inside a container")
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, module in selected.items():
        others = [owner for owner in owners[id(module.weight)] if owner != name]
        if others:
            raise ValueError(
                f"cannot factorize {name!r}: its weight is tied to {others[0]!r}; untie it or exclude it with filter_fn"
            )
    return selected


def _skeleton(donor: Donor, rank: int, depth: int, contraction: Contraction) -> FactorizedMatrix:
    """A factorized layer in the place of the donor, its factors uninitialized; the bias is the donor's own Parameter."""
    common: dict[str, Any] = {"depth": depth, "device": donor.weight.device, "dtype": donor.weight.dtype}
    layer: FactorizedMatrix
    if isinstance(donor, nn.Conv2d):
        layer = nn.utils.skip_init(
            FactorizedConv2d,
            donor.in_channels,
            donor.out_channels,
            donor.kernel_size,
            rank,
            stride=donor.stride,
            padding=donor.padding,
            dilation=donor.dilation,
            bias=donor.bias is not None,
            padding_mode=donor.padding_mode,
            contraction=contraction,
            **common,
        )
    elif isinstance(donor, nn.Linear):
        args = (donor.in_features, donor.out_features, rank, donor.bias is not None)
        layer = nn.utils.skip_init(FactorizedLinear, *args, contraction=contraction, **common)
    else:
        args = (donor.num_embeddings, donor.embedding_dim, rank, donor.padding_idx)
        layer = nn.utils.skip_init(FactorizedEmbedding, *args, contraction=contraction, **common)
    for factor in layer.factors():
        factor.requires_grad_(donor.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = donor.bias
    return layer.train(donor.training)


def _initialize(layer: FactorizedMatrix, donor: Donor, config: LowRankConfig) -> None:
    matrix = linalg.as_matrix(donor.weight.detach())
    if isinstance(layer, FactorizedEmbedding) and layer.padding_idx is not None:
        matrix = matrix.index_fill(0, torch.tensor(layer.padding_idx, device=matrix.device), 0)
    if callable(config.init):
        layer.set_factors(*config.init(matrix, layer.rank))
    elif config.init == "spectral":
        u, vt = linalg.spectral_init(matrix, layer.rank)
        layer.set_factors(*((u, torch.eye(layer.rank), vt) if layer.depth == 3 else (u, vt)))
    else:
        layer.reset_factors()
    if config.residual:
        with torch.no_grad():
            layer.m.add_(torch.randn_like(layer.m), alpha=config.residual)
    if config.init == "norm-matched":
        spectral = [linalg.to_float64(factor) for factor in linalg.spectral_init(matrix, layer.rank)]
        layer.set_factors(*linalg.rescale(layer.factors(), linalg.frobenius_norm(spectral)))


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its module is referenced, shared modules included."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[key] = replacements[child]


def _report(model: nn.Module, layers: Mapping[str, tuple[Donor, FactorizedMatrix]], original: int) -> FactorizationReport:
    rows = tuple(
        LayerReport(name, tuple(donor.weight.shape), layer.rank, count_parameters(donor), count_parameters(layer))
        for name, (donor, layer) in layers.items()
    )
    return FactorizationReport(rows, original, count_parameters(model))


def factorize_(model: nn.Module, config: LowRankConfig, *, filter_fn: FilterFn | None = None) -> FactorizationReport:
    """Replace the selected Linear, Conv2d and Embedding layers of a model by factorized ones, in place.

    ``filter_fn(module, name)`` selects; without it every such layer is selected. Layers that are not selected are not
    touched; selected ones keep bias, stride, padding, dilation, device, dtype, mode and requires_grad. Call it before
    the optimizer is made: the weights of replaced layers are new Parameters.

    Raises ValueError, with the model as it was, where nothing is selected, a selected layer is unsupported (groups > 1,
    transposed, tied, parametrized), or an entry of ``config.rank_pattern`` matches no selected layer.
    """
    donors = _select(model, filter_fn)
    for pattern in config.rank_pattern:
        if not any(re.fullmatch(pattern, name) for name in donors):
            raise ValueError(
                f"rank_pattern {pattern!r} matches none of the {len(donors)} selected layers, such as {next(iter(donors))!r}"
            )
    original = count_parameters(model)
    layers = {}
    for name, donor in donors.items():
        scale = config.scale_for(name)
        if scale == 0:
            continue
        layer = _skeleton(donor, _rank(_rank_dimension(donor), scale), config.depth, config.contraction)
        _initialize(layer, donor, config)
        layers[name] = (donor, layer)
    _replace(model, dict(layers.values()))
    return _report(model, layers, original)


def load_factorized_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> FactorizationReport:
    """Load a state dict, first giving the model the factorized layers that the state dict holds, in place.

    ``model`` is the dense architecture; ranks and depth come from the shapes in the state dict, so that a factorized
    model is rebuilt from its checkpoint alone. A dense state dict is loaded as it is. What wrappers such as DataParallel add
    is removed (:func:`common.state_dicts.unwrap`). As in ``load_state_dict``, normalizations may lack the count of batches
    that torch has had since 0.4.1. Raises ValueError, with the model as it was, naming the first mismatch.
    """
    state_dict = unwrap(state_dict, model.state_dict())
    original = count_parameters(model)
    layers: dict[str, tuple[Donor, FactorizedMatrix]] = {}
    made: dict[nn.Module, FactorizedMatrix] = {}  # a module that is used twice becomes one layer used twice
    expected = dict(model.state_dict())
    for name, donor in model.named_modules(remove_duplicate=False):
        if f"{name}.vt" in state_dict and isinstance(donor, _DONORS):
            if donor not in made:
                rank, depth = state_dict[f"{name}.vt"].shape[0], 3 if f"{name}.m" in state_dict else 2
                made[donor] = _skeleton(_checked(donor, name), rank, depth, "auto")
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
    _replace(model, dict(layers.values()))
    model.load_state_dict(state_dict)
    return _report(model, layers, original)


def densify_(model: nn.Module) -> list[str]:
    """Fold every factorized layer back into an ordinary one with the same function, in place; returns their names.

    Raises ValueError where there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Factorized)}
    if not layers:
        raise ValueError(f"nothing to fold: {type(model).__name__} has no factorized layer")
    if "" in layers:
        raise ValueError(f"cannot replace the model itself in place: use its to_layer() ({type(model).__name__})")
    _replace(model, {module: module.to_layer() for module in layers.values()})
    return list(layers)


def rank_scale_for_ratio(
    model: nn.Module,
    target: float,
    *,
    filter_fn: FilterFn | None = None,
    depth: int = 2,
    rank_pattern: Mapping[str, float] | None = None,
) -> float:
    """Rank scale at which the factorized model's parameter count is closest to ``target`` times the model's own.

    Counts on shapes alone. Ranks are integers, so the count is a step function of the scale; the middle of the best
    step is returned. ``rank_pattern`` fixes the scale of some layers as in :class:`LowRankConfig`. Raises ValueError
    for a target that is not positive and finite, or below what rank 1 everywhere leaves (naming that floor and the
    largest layer that is not factorized).
    """
    if not math.isfinite(target) or target <= 0:
        raise ValueError(f"target ratio must be positive and finite, got {target}")
    fixed = LowRankConfig(0, depth=depth, rank_pattern=rank_pattern or {})
    donors = _select(model, filter_fn)
    original = count_parameters(model)
    rest = original - sum(donor.weight.numel() for donor in donors.values())
    free: dict[tuple[tuple[int, int], int], int] = {}  # (matrix shape, rank dimension) -> number of such layers
    for name, donor in donors.items():
        shape, dimension = _matrix_shape(donor), _rank_dimension(donor)
        if any(re.fullmatch(pattern, name) for pattern in fixed.rank_pattern):
            scale = fixed.scale_for(name)
            rest += _factor_numel(shape, _rank(dimension, scale), depth) if scale else donor.weight.numel()
        else:
            free[shape, dimension] = free.get((shape, dimension), 0) + 1
    if not free:
        raise ValueError("every selected layer has a fixed rank scale in rank_pattern: there is none left to solve for")

    def count(scale: float) -> int:
        return rest + sum(n * _factor_numel(s, _rank(d, scale), depth) for (s, d), n in free.items())

    floor = count(0)
    if target * original < floor:
        dense = [(p.numel(), n) for n, p in model.named_parameters() if not any(p is d.weight for d in donors.values())]
        largest = f"; {max(dense)[1]!r} keeps {max(dense)[0]:,} of them dense" if dense else ""
        raise ValueError(
            f"target ratio {target} is below the floor: rank 1 everywhere leaves {floor:,} of {original:,} parameters, "
            f"a ratio of {floor / original:.6f}{largest}"
        )
    wanted = target * original
    limit = 1
    while count(limit) < wanted:
        limit *= 2
    # First to the nearest whole scale, then among the steps around it: an overcomplete scale may have very many below.
    whole = closest_index(count, 0, limit, wanted)
    scales = step_midpoints((dimension for _, dimension in free), max(0, whole - 2), whole + 2)
    return scales[closest_index(lambda step: count(scales[step]), 0, len(scales) - 1, wanted)]
