"""Losses of a student: knowledge distillation (Hinton et al. 2015) and attention transfer (Zagoruyko & Komodakis 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def attention(activation: Tensor) -> Tensor:
    """Attention map of a stage: mean square over the channels of (N, C, H, W), as vectors (N, H W) of length 1."""
    return F.normalize(activation.float().square().mean(1).flatten(1))


def distillation_loss(
    logits: Tensor,
    activations: Sequence[Tensor],
    teacher_logits: Tensor,
    teacher_activations: Sequence[Tensor],
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """(1 - alpha) cross-entropy + 2 T^2 alpha KL(teacher || student at temperature T) + beta 3/S sum of attention distances.

    The divergence is a mean over samples and classes. The distance of each of the S stages is a mean over samples and places.
    The released code normalizes them so, and its default strengths suit that. Stages must have the same height and width.
    """
    loss = (1 - alpha) * F.cross_entropy(logits.float(), labels)
    if alpha:
        student, teacher = (values.float().div(temperature).log_softmax(1) for values in (logits, teacher_logits))
        loss = loss + 2 * temperature**2 * alpha * F.kl_div(student, teacher, reduction="none", log_target=True).mean()
    distances = [
        (attention(one) - attention(other)).square().mean() for one, other in zip(activations, teacher_activations, strict=True)
    ]
    return loss + beta * 3 / len(distances) * sum(distances)
