"""fairseq's translation task, with exact resumption. It also reports its updates and logs norms of products."""

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

# The flags of fairseq's translation task, and one more. A class statement here would store types as text, which fairseq cannot
# read.
_rebuild = field(default=False, metadata={"help": "group training sentences into batches again in each epoch"})
TaskConfig = make_dataclass("TaskConfig", [("rebuild_batches", bool, _rebuild)], bases=(TranslationConfig,))


@register_task(TASK, dataclass=TaskConfig)
class ObservedTranslation(TranslationTask):
    """Translation that calls ``before_step`` before every update, and logs the result of :func:`norms` in each epoch."""

    before_step: ClassVar[Callable[[int], None] | None] = None

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, ignore_grad: bool = False
    ) -> Any:
        if ObservedTranslation.before_step is not None:
            ObservedTranslation.before_step(update_num)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Batches that do not depend on the epoch in which training resumes.

        fairseq draws batches once, seeded by the first epoch of the process, and keeps them. Training that resumed in its third
        epoch would then see other batches than uninterrupted training. Here the seed is always that of epoch 1. With
        ``rebuild_batches``, which fairseq supports for tasks with a field of that name, the training batches depend on their
        own epoch; the validation batches stay the same.
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
        """The count of ``--patience``, which fairseq does not keep when training resumes."""
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

    The norms are the Frobenius norm, the nuclear norm, and the bound on the nuclear norm that weight decay on the factors
    penalizes (paper, equation 2). Families that the model lacks are left out.
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
        # In float64, since the norm of an embedding overflows in half precision.
        each = [norm([linalg.to_float64(factor) for factor in factors]).mean().cpu() for factors in products]
        return torch.stack(each).mean().item()

    found = [(family, products) for family, products in families.items() if products]
    return {f"{family}_{kind}": mean(norm, products) for family, products in found for kind, norm in kinds.items()}
