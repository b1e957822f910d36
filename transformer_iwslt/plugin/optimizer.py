"""Exempt the parameters that Frobenius decay covers from the weight decay of fairseq's optimizers.

fairseq builds its optimizers from one list of parameters and cannot exempt some of them from weight decay. This module wraps
the function that builds them, which fairseq calls for every precision, and splits the list afterwards.
"""

from __future__ import annotations

from typing import Any

from fairseq import optim

EXEMPT = "param_group"  # the attribute that fairseq copies from half-precision parameters to their float32 masters

_build = optim.build_optimizer


def build_optimizer(cfg: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """fairseq's optimizer with two groups of parameters: with weight decay, and without it for those marked exempt."""
    optimizer = _build(cfg, params, *args, **kwargs)
    groups = getattr(optimizer, "param_groups", [])
    if len(groups) == 1:
        exempt = [p for p in groups[0]["params"] if hasattr(p, EXEMPT)]
        rest = [p for p in groups[0]["params"] if not hasattr(p, EXEMPT)]
        if exempt:
            groups[:] = [{**groups[0], "params": rest}, {**groups[0], "params": exempt, "weight_decay": 0.0}]
    return optimizer


setattr(optim, "build_optimizer", build_optimizer)  # noqa: B010 (an assignment would be a type error)
