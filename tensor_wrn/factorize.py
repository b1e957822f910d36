"""Makes the network of a configuration: dense, low-rank or with tensor convolutions, at a rank scale or a budget."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common import FactorizationReport, LowRankConfig, factorize_, linalg, rank_scale_for_ratio
from common.budget import closest_index, count_parameters, step_midpoints
from common.layers import Factorized
from common.linalg import fan_out_init
from common.surgery import LayerReport
from tensor_wrn.config import WideResNetConfig
from tensor_wrn.layers import SeparableConv2d, TensorPointwise
from tensor_wrn.models import WideResNet, build, is_factorized


def make_model(config: WideResNetConfig, architecture: dict[str, Any]) -> tuple[WideResNet, FactorizationReport]:
    """The network of a configuration and the report of its factorization. Sets ``rank_scale`` in the architecture of tensors.

    Raises ValueError if a budget cannot be reached.
    """
    if config.form != "Conv":
        architecture["rank_scale"] = config.rank_scale or tensor_scale_for_ratio(architecture, config.target_ratio)
        return make_tensors(architecture, config.init)
    model = build(architecture)
    if not config.factorized:
        return model, FactorizationReport.dense(model)
    scale = config.rank_scale or rank_scale_for_ratio(model, config.target_ratio, filter_fn=is_factorized)
    layers: list[LayerReport] = []
    original = count_parameters(model)
    for kernel in (3, 1):  # regular initialization draws factors with the deviation that suits their kernel

        def of_kernel(module: nn.Module, name: str, kernel: int = kernel) -> bool:
            return is_factorized(module, name) and isinstance(module, nn.Conv2d) and module.kernel_size[0] == kernel

        inits = {"regular": partial(fan_out_init, kernel=kernel), "norm-matched": partial(norm_matched_init, kernel=kernel)}
        init = inits.get(config.init, config.init)
        layers += factorize_(model, LowRankConfig(scale, init=init), filter_fn=of_kernel, skip_growing=False).layers
    return model, FactorizationReport(tuple(layers), original, count_parameters(model))


def norm_matched_init(matrix: Tensor, rank: int, *, kernel: int) -> tuple[Tensor, Tensor]:
    """The factors of :func:`fan_out_init`, scaled alike to the norm of the matrix's spectral initialization."""
    norm = linalg.frobenius_norm(linalg.spectral_init(matrix, rank))
    u, vt = linalg.rescale(fan_out_init(matrix, rank, kernel=kernel), norm)
    return u, vt


def make_tensors(architecture: dict[str, Any], init: str) -> tuple[WideResNet, FactorizationReport]:
    """An initialized network of tensor convolutions, and its report relative to the network of ordinary ones."""
    model = build(architecture)
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, SeparableConv2d):
            module.pointwise.initialize_(init)
            outputs, inputs, rank = module.pointwise.out_channels, module.pointwise.in_channels, max(module.pointwise.ranks())
            size = (outputs, inputs, *module.depthwise.kernel_size)
            layers.append(LayerReport(name, size, rank, math.prod(size), count_parameters(module)))
    return model, FactorizationReport(tuple(layers), _count({**architecture, "form": "Conv"}), count_parameters(model))


def _count(architecture: dict[str, Any]) -> int:
    with torch.device("meta"):
        return count_parameters(build(architecture))


def tensor_scale_for_ratio(architecture: dict[str, Any], target: float) -> float:
    """The rank scale in (0, 1] whose parameter count is closest to ``target`` times that of the ordinary network.

    Ranks are integers, so the count is a step function of the scale; the middle of the best step is returned. Raises
    ValueError, naming the limit, if the target is more than 1 % below the count at rank 1 or above the count at full ranks.
    """
    original = _count({**architecture, "form": "Conv"})
    with torch.device("meta"):
        model = build({**architecture, "rank_scale": 1.0})
    tensors = [module for module in model.modules() if isinstance(module, TensorPointwise)]
    scales = step_midpoints((side for tensor in tensors for side in tensor.shape), 0.0, 1.0)
    rest = count_parameters(model) - sum(count_parameters(tensor) for tensor in tensors)

    def count(scale: float) -> int:
        with torch.device("meta"):
            made = (type(t)(t.in_channels, t.out_channels, scale, t.rule) for t in tensors)
            return rest + sum(count_parameters(tensor) for tensor in made)

    wanted = target * original
    for bound, scale, wrong in (("fewest", scales[0], count(scales[0]) > 1.01 * target * original),
                                ("most", scales[-1], count(scales[-1]) < 0.99 * target * original)):  # fmt: skip
        if wrong:
            reach = f"the {bound} that {architecture['form']} can have are {count(scale):,} ({count(scale) / original:.4g})"
            raise ValueError(f"--target-ratio {target:g} is {round(wanted):,} parameters, but {reach}")
    return scales[closest_index(lambda step: count(scales[step]), 0, len(scales) - 1, wanted)]


def factorized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The factorized layers, whose norms are recorded."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Factorized)}
