"""fairseq's translation task, exact to go on with, which also tells of its updates and logs norms of products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, make_dataclass
from typing import Any, ClassVar

import torch
from fairseq.logging import metrics
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from fairseq_cli.train import should_stop_early
from torch import Tensor, nn

from common import linalg
from common.layers import Factorized
from transformer_iwslt.config import TASK
from transformer_iwslt.model import attentions

# The flags of fairseq's translation task, and one more. A class here would hold its type as text, which fairseq cannot read.
_rebuild = field(default=False, metadata={"help": "compose the batches of training anew in each epoch"})
TaskConfig = make_dataclass("TaskConfig", [("rebuild_batches", bool, _rebuild)], bases=(TranslationConfig,))


@register_task(TASK, dataclass=TaskConfig)
class ObservedTranslation(TranslationTask):
    """Translation that tells ``before_step`` of every update, and logs what :func:`norms` finds with each epoch."""

    before_step: ClassVar[Callable[[int], None] | None] = None

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, ignore_grad: bool = False
    ) -> Any:
        if ObservedTranslation.before_step is not None:
            ObservedTranslation.before_step(update_num)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Batches of the same sentences whichever epoch a training goes on in, or batches of each epoch's own.

        fairseq draws them once, seeded by the epoch that it starts with, and keeps them: gone on with in its third epoch, a
        training would see others than one that was not interrupted. With ``rebuild_batches``, which fairseq has for tasks with
        a field of that name, batches of training depend on the epoch they are for; those of validation stay.
        """
        cfg: Any = self.cfg
        asked = cfg.rebuild_batches
        rebuilt = asked and dataset is self.datasets.get(cfg.train_subset)
        if not (rebuilt or kwargs.get("update_epoch_batch_itr") or kwargs.get("disable_iterator_cache")):
            kwargs["epoch"] = 1
        cfg.rebuild_batches = rebuilt
        try:
            return super().get_batch_iterator(dataset, *args, **kwargs)
        finally:
            cfg.rebuild_batches = asked

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """What ``--patience`` counts, which fairseq forgets when a training goes on."""
        return {type(self).__name__: dict(vars(should_stop_early))}

    def set_checkpoint_dict(self, held: dict[str, Any]) -> None:
        vars(should_stop_early).update(held)

    def begin_valid_epoch(self, epoch: int, model: nn.Module) -> None:
        super().begin_valid_epoch(epoch, model)
        for name, value in norms(model).items():
            metrics.log_scalar(name, value, weight=0, priority=2000)  # the latest, not an average


@torch.no_grad()
def norms(model: nn.Module) -> dict[str, float]:
    """Mean norms of three families of products: factorized layers (``layers``), query-key, output-value.

    Of each its Frobenius norm, its nuclear norm, and the bound on the nuclear norm that weight decay on the factors acts on
    (paper, equation 2). Families that the model lacks are left out.
    """
    families: dict[str, list[tuple[Tensor, ...]]] = {"layers": [], "query_key": [], "output_value": []}
    for module in model.modules():
        if isinstance(module, Factorized):
            families["layers"].append(module.matrices())
    for name, attention in attentions(model).items():
        families["query_key"].append(attention.query_key(name).factors())
        families["output_value"].append(attention.output_value(name).factors())
    kinds = {
        "frobenius_norm": linalg.frobenius_norm,
        "nuclear_norm": linalg.nuclear_norm,
        "nuclear_norm_bound": linalg.nuclear_norm_bound,
    }

    def mean(norm: Callable[[list[Tensor]], Tensor], products: list[tuple[Tensor, ...]]) -> float:
        # In float64: half precision overflows at the norm of an embedding.
        each = [norm([linalg.to_float64(factor) for factor in factors]).mean().cpu() for factors in products]
        return torch.stack(each).mean().item()

    found = [(family, products) for family, products in families.items() if products]
    return {f"{family}_{kind}": mean(norm, products) for family, products in found for kind, norm in kinds.items()}
