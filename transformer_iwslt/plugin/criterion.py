"""fairseq's cross-entropy losses plus Frobenius decay."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from torch import Tensor, nn

from common import FrobeniusDecay
from transformer_iwslt.config import CRITERIONS


class FrobeniusMixin(FairseqCriterion):
    """Adds the penalty, times the batch's sample size, to the training loss. Its gradient is thus added before clipping.

    fairseq sums gradients over the batches of an update (``--update-freq``) and over processes, and divides the sum by the sum
    of sample sizes. So the gradient of the penalty counts once. Validation has no penalty, and the logged loss is fairseq's
    own. The model's ``decay`` says which products are decayed, and how strongly.
    """

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, Any, dict[str, Any]]:
        loss, sample_size, logging_output = super().forward(model, sample, reduce)
        decay: FrobeniusDecay | None = getattr(model, "decay", None)
        if decay is not None and decay.coef > 0 and model.training and torch.is_grad_enabled():
            with torch.autocast(loss.device.type, enabled=False):
                loss = loss + sample_size * decay.penalty()
        return loss, sample_size, logging_output


@register_criterion(CRITERIONS["cross_entropy"], dataclass=CrossEntropyCriterionConfig)
class FrobeniusCrossEntropy(FrobeniusMixin, CrossEntropyCriterion):
    """Cross entropy and Frobenius decay."""


@register_criterion(CRITERIONS["label_smoothed_cross_entropy"], dataclass=LabelSmoothedCrossEntropyCriterionConfig)
class FrobeniusLabelSmoothedCrossEntropy(FrobeniusMixin, LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross entropy and Frobenius decay."""
