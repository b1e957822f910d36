"""Factorized neural layers: spectral initialization, Frobenius decay, and the model surgery that applies them.

The method is Khodak, Tenenholtz, Mackey and Fusi, "Initialization and Regularization of Factorized Neural Layers", ICLR 2021.
Names are loaded on first use, so that programs that only read tables or write scripts start without torch.

The repository's programs import this package as ``common``, the name of its folder. The installed package is ``fnl``. A
process can use only one of the two, because each name has its own classes: decay under one name, for instance, would silently
skip the layers made under the other.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention import MultiheadAttention as MultiheadAttention
    from .attention import attention_pairs as attention_pairs
    from .attention import balance_ as balance_
    from .decay import FactorPair as FactorPair
    from .decay import FrobeniusDecay as FrobeniusDecay
    from .decay import param_groups as param_groups
    from .lamb import Lamb as Lamb
    from .layers import Factorized as Factorized
    from .layers import FactorizedConv1d as FactorizedConv1d
    from .layers import FactorizedConv2d as FactorizedConv2d
    from .layers import FactorizedEmbedding as FactorizedEmbedding
    from .layers import FactorizedLinear as FactorizedLinear
    from .surgery import FactorizationReport as FactorizationReport
    from .surgery import LowRankConfig as LowRankConfig
    from .surgery import densify_ as densify_
    from .surgery import factorize_ as factorize_
    from .surgery import load_factorized_ as load_factorized_
    from .surgery import rank_scale_for_ratio as rank_scale_for_ratio

_HOME = {
    "MultiheadAttention": "attention",
    "attention_pairs": "attention",
    "balance_": "attention",
    "FactorPair": "decay",
    "FrobeniusDecay": "decay",
    "param_groups": "decay",
    "Lamb": "lamb",
    "Factorized": "layers",
    "FactorizedConv1d": "layers",
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

_LIBRARY = "factorized-neural-layers"  # distinguishes this package from any other called common

for _name in {"common", "fnl"} - {__name__}:
    _other = sys.modules.get(_name)
    if _other is not None and getattr(_other, "_LIBRARY", None) == _LIBRARY:
        raise ImportError(
            f"the library of factorized neural layers is already loaded as {_name!r} from {_other.__file__} and cannot also be "
            f"loaded as {__name__!r} from {__file__}: import it under one name, which is 'fnl' in your own code"
        )


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
