"""fairseq's translation task, which also tells a run what happens and logs the norms of factorized products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from fairseq.logging import metrics
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import Tensor, nn

from common import FactorPair, linalg
from common.layers import FactorizedMatrix
from transformer_iwslt.flags import TASK
from transformer_iwslt.model import attentions


@register_task(TASK, dataclass=TranslationConfig)
class ObservedTranslation(TranslationTask):
    """Translation that tells ``before_step`` of every update, and logs the statistics of :func:`norms` with each epoch."""

    before_step: ClassVar[Callable[[int], None] | None] = None

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, ignore_grad: bool = False
    ) -> Any:
        if ObservedTranslation.before_step is not None:
            ObservedTranslation.before_step(update_num)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def begin_valid_epoch(self, epoch: int, model: nn.Module) -> None:
        super().begin_valid_epoch(epoch, model)
        for name, value in norms(model).items():
            metrics.log_scalar(name, value, priority=2000)


@torch.no_grad()
def norms(model: nn.Module) -> dict[str, float]:
    """Mean norms of three families of products: factorized layers (``layers``), query-key, output-value.

    Of each its Frobenius norm, its nuclear norm, and the bound on the nuclear norm that weight decay on the factors acts on
    (paper, equation 2). Families that the model lacks are left out.
    """
    pairs: dict[str, list[FactorPair]] = {"query_key": [], "output_value": []}
    for name, attention in attentions(model).items():
        pairs["query_key"].append(attention.query_key(name))
        pairs["output_value"].append(attention.output_value(name))
    families: dict[str, list[tuple[Tensor, ...]]] = {
        "layers": [m.factors() for m in model.modules() if isinstance(m, FactorizedMatrix)]
    }
    families |= {family: [pair.factors() for pair in found] for family, found in pairs.items()}
    kinds = {
        "frobenius_norm": linalg.frobenius_norm,
        "nuclear_norm": linalg.nuclear_norm,
        "nuclear_norm_bound": linalg.nuclear_norm_bound,
    }
    return {
        f"{family}_{kind}": torch.stack([norm(factors).mean().double().cpu() for factors in products]).mean().item()
        for family, products in families.items()
        if products
        for kind, norm in kinds.items()
    }
