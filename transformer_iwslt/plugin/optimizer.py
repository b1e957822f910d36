"""Weight decay of fairseq's optimizers leaves out what Frobenius decay covers.

fairseq builds its optimizers from one list of parameters and has no place to say that some take no weight decay. Here the
function that builds them, which every precision of fairseq goes through, splits the list afterwards.
"""

from __future__ import annotations

from typing import Any

from fairseq import optim

EXEMPT = "param_group"  # the attribute that fairseq copies from half-precision parameters to their float32 masters

_build = optim.build_optimizer


def build_optimizer(cfg: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """fairseq's optimizer, its parameters in a group with weight decay and one, of those marked exempt, without."""
    optimizer = _build(cfg, params, *args, **kwargs)
    groups = getattr(optimizer, "param_groups", [])
    if len(groups) == 1:
        exempt = [p for p in groups[0]["params"] if hasattr(p, EXEMPT)]
        rest = [p for p in groups[0]["params"] if not hasattr(p, EXEMPT)]
        if exempt:
            groups[:] = [{**groups[0], "params": rest}, {**groups[0], "params": exempt, "weight_decay": 0.0}]
    return optimizer


setattr(optim, "build_optimizer", build_optimizer)  # noqa: B010 (said to be of another type)
