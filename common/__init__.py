"""Factorized neural layers: spectral initialization, Frobenius decay, and the model surgery that applies them.

The method is Khodak, Tenenholtz, Mackey and Fusi, "Initialization and Regularization of Factorized Neural Layers", ICLR 2021.
Names are loaded on first use, so that programs which only read tables or write scripts start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.decay import FactorPair as FactorPair
    from common.decay import FrobeniusDecay as FrobeniusDecay
    from common.decay import param_groups as param_groups
    from common.layers import Factorized as Factorized
    from common.layers import FactorizedConv2d as FactorizedConv2d
    from common.layers import FactorizedEmbedding as FactorizedEmbedding
    from common.layers import FactorizedLinear as FactorizedLinear
    from common.surgery import FactorizationReport as FactorizationReport
    from common.surgery import LowRankConfig as LowRankConfig
    from common.surgery import densify_ as densify_
    from common.surgery import factorize_ as factorize_
    from common.surgery import load_factorized_ as load_factorized_
    from common.surgery import rank_scale_for_ratio as rank_scale_for_ratio

_HOME = {
    "FactorPair": "decay",
    "FrobeniusDecay": "decay",
    "param_groups": "decay",
    "Factorized": "layers",
    "FactorizedConv2d": "layers",
    "FactorizedEmbedding": "layers",
    "FactorizedLinear": "layers",
    "FactorizationReport": "surgery",
    "LowRankConfig": "surgery",
    "densify_": "surgery",
    "factorize_": "surgery",
    "load_factorized_": "surgery",
    "rank_scale_for_ratio": "surgery",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'common' has no attribute {name!r}")
    return getattr(import_module(f"common.{_HOME[name]}"), name)
