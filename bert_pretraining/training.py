"""The training loop of pre-training with masked-language modeling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_pretraining.config import PretrainingConfig
from bert_pretraining.data import IGNORED, Batch, Feed, PretrainingData
from bert_pretraining.model import MaskedLanguageModel
from common import linalg
from common.decay import FactorPair
from common.experiments.distributed import Processes
from common.experiments.runs import Run
from common.experiments.training import TrainingLoop


def masked_loss(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the positions to predict, in nats, and three sums: loss, correct answers and answers.

    The loss is divided by the number of positions, even if some are not scored, so that the losses of a batch's parts add up.
    """
    logits = network(batch.tokens, batch.positions).float()
    summed = F.cross_entropy(logits, batch.targets, ignore_index=IGNORED, reduction="sum")
    with torch.no_grad():
        correct = (logits.argmax(1) == batch.targets).sum()
        sums = torch.stack([summed, correct.to(summed.dtype), (batch.targets != IGNORED).sum().to(summed.dtype)])
    return summed / len(batch.targets), sums


@torch.inference_mode()
def evaluate(model: MaskedLanguageModel, data: PretrainingData, split: str, processes: Processes) -> dict[str, float]:
    """Masked loss in nats, perplexity, and accuracy in percent on a split with fixed masks."""
    model.eval()
    sums = [torch.zeros(3, device=processes.device)]  # of each batch; they stay on the device until the end
    for batch in data.evaluation_batches(split, rank=processes.rank, world_size=processes.world_size):
        sums.append(masked_loss(model, batch)[1])
    totals = torch.zeros(3, dtype=torch.float64)
    for each in torch.stack(sums).cpu():  # Apple's GPU has no float64
        totals += each
    if processes.world_size > 1:
        totals = processes.sum(totals.to(processes.device))
    loss, correct, answers = totals.tolist()
    return {"loss": loss / answers, "perplexity": math.exp(min(loss / answers, 700)), "accuracy": 100 * correct / answers}


def learning_rate(config: PretrainingConfig, step: int) -> float:
    """The learning rate of a step, counted from 0.

    It rises from 0 during the warm-up. Then it is ``lr`` times a power of the share of remaining steps. That share is relative
    to all steps, so the learning rate drops at the end of the warm-up, as in BERT's code and NVIDIA's recipe.
    """
    share = step / config.steps
    if share < config.warmup:
        return config.lr * min(1.0, (step + 1) / (config.warmup * config.steps))
    return config.lr * (1 - share) ** config.lr_power


@torch.no_grad()
def product_norms(products: Mapping[str, Sequence[FactorPair]]) -> dict[str, float]:
    """Mean Frobenius norm of the heads' products for each kind of product: ``quekey_norm``, ``outval_norm``."""
    found = {}
    for name, pairs in products.items():
        norms = [linalg.frobenius_norm([linalg.to_float64(factor) for factor in pair.factors()]) for pair in pairs]
        found[f"{name}_norm"] = torch.cat(norms).mean().item()
    return found


class PretrainingLoop(TrainingLoop):
    """Trains a masked language model for ``config.steps`` steps; see :class:`TrainingLoop`.

    Each epoch is scored by the loss on the validation split. The batch is split over the processes and, in each process, into
    ``config.update_freq`` parts.
    """

    split: ClassVar[str] = "valid"
    speed: ClassVar[str] = "tokens_per_second"
    lower_is_better: ClassVar[bool] = True
    config: PretrainingConfig
    model: MaskedLanguageModel

    def __init__(self, model: MaskedLanguageModel, data: PretrainingData, run: Run, *, tokenizer: str, **options: Any) -> None:
        config: PretrainingConfig = options["config"]
        self.data, self.tokenizer = data, tokenizer
        last_step = min(config.steps, config.max_steps or config.steps)
        super().__init__(model, run, steps_per_epoch=config.epoch_steps, last_step=last_step, **options)

    def state_dict(self) -> dict[str, Any]:
        """The state of any training loop, and the digest of the tokenizer."""
        return super().state_dict() | {"tokenizer": self.tokenizer}

    def learning_rate(self) -> float:
        return learning_rate(self.config, min(self.step, self.config.steps - 1))

    def batch(self, step: int) -> Batch:
        return self.data.train_batch(step, rank=self.processes.rank, world_size=self.processes.world_size)

    def parts(self, batch: Batch) -> list[Batch]:
        return batch.chunk(self.config.update_freq)

    def feed(self) -> Feed:
        return Feed(self.data)

    def next_step(self) -> None:
        if self._graph is not None and self.step % self.data.steps_per_pass == 0:
            self._feed.start(self.step)
        super().next_step()

    def loss_and_sums(self, network: nn.Module, part: Batch) -> tuple[Tensor, Tensor]:
        return masked_loss(network, part)

    def before_optimizer(self) -> None:
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)

    def evaluate(self) -> dict[str, float]:
        return evaluate(self.model, self.data, self.split, self.processes)

    def score(self, evaluated: Mapping[str, float]) -> float:
        return evaluated["loss"]

    def samples_per_answer(self) -> float:
        return self.data.seq / self.data.predictions
