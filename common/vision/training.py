"""The training loop of the image programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contraction import automatic_layers, measure_contractions, set_contractions_
from ..experiments.distributed import Processes
from ..experiments.runs import Run
from ..experiments.training import TrainingLoop
from .config import ImageRunConfig
from .data import Batch, Data, Feed

_EVALUATION_BATCH = 1000


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data, processes: Processes) -> dict[str, float]:
    """Accuracy in percent and mean cross-entropy on the test split."""
    model.eval()
    processes.share_buffers(model)
    sums = [torch.zeros(2, device=processes.device)]  # one per batch, left on the device until the end
    for batch in data.test_batches(_EVALUATION_BATCH, rank=processes.rank, world_size=processes.world_size):
        logits = model(batch.images).float()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        sums.append(torch.stack([loss, (logits.argmax(1) == batch.labels).sum().to(loss.dtype)]))
    totals = torch.stack(sums).cpu().double().sum(0)
    if processes.world_size > 1:
        totals = processes.sum(totals.to(processes.device))
    loss, correct = totals.tolist()
    count = len(data.test_labels)
    return {"accuracy": 100 * correct / count, "loss": loss / count}


def _cross_entropy(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = network(batch.images)
    return F.cross_entropy(logits.float(), batch.labels), logits


def sgd(groups: Sequence[dict[str, Any]], config: ImageRunConfig, device: torch.device) -> torch.optim.SGD:
    """SGD with momentum. On a GPU it is fused, and its learning rate is a tensor there, as a recorded step requires."""
    if device.type != "cuda":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.SGD(groups, lr=torch.tensor(config.lr, device=device), momentum=config.momentum, fused=True)


class Trainer(TrainingLoop):
    """Trains a model on images for ``config.epochs`` epochs. Takes the options of :class:`TrainingLoop` and these:

    config:    the flags of the run, or a copy of them with other epochs or another seed.
    schedule:  maps an epoch, counted from 0, to its learning rate.
    loss:      maps the network and a batch to the loss to minimize and the logits (default: cross-entropy).

    On one GPU, the faster contraction of each factorized layer is measured before the first step. If the last batch of an
    epoch is smaller, its step is not recorded.
    """

    speed: ClassVar[str] = "images_per_second"

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        run: Run,
        *,
        config: ImageRunConfig,
        processes: Processes,
        schedule: Callable[[int], float],
        loss: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]] | None = None,
        **options: Any,
    ) -> None:
        self.data, self.schedule, self.loss = data, schedule, loss or _cross_entropy
        steps = data.steps_per_epoch(config.batch_size, processes.world_size)
        last_step = min(config.epochs * steps, config.max_steps or sys.maxsize)
        options |= {"config": config, "processes": processes, "steps_per_epoch": steps, "last_step": last_step}
        if processes.device.type == "cuda" and processes.world_size == 1:
            cast(Any, model).to(memory_format=torch.channels_last)  # as the images are
        super().__init__(model, run, **options)

    def learning_rate(self) -> float:
        return self.schedule(self.step // self.steps_per_epoch)

    def batch(self, step: int) -> Batch:
        epoch, step = divmod(step, self.steps_per_epoch)
        rank, world_size = self.processes.rank, self.processes.world_size
        seed, size = self.config.seed, self.config.batch_size
        return self.data.train_batch(seed, epoch, step, size, rank=rank, world_size=world_size)

    def feed(self) -> Feed:
        return self.data.feed(self.config.seed, self.config.batch_size)

    def is_whole(self, step: int) -> bool:
        return (step % self.steps_per_epoch + 1) * self.config.batch_size <= len(self.data)

    def loss_and_sums(self, network: nn.Module, part: Batch) -> tuple[Tensor, Tensor]:
        loss, logits = self.loss(network, part)
        with torch.no_grad():
            samples = torch.full_like(loss, len(part.labels))
            return loss, torch.stack([loss * samples, (logits.argmax(1) == part.labels).sum().to(loss.dtype), samples])

    def evaluate(self) -> dict[str, float]:
        return evaluate(self.model, self.data, self.processes)

    def score(self, evaluated: Mapping[str, float]) -> float:
        return evaluated["accuracy"]

    def choose_contractions(self) -> None:
        """Set the contractions: those of the resumed run or, in a new run, those that are measured to be faster."""
        if self.contractions is None and automatic_layers(self.model):
            batch = self.data.train_batch(self.config.seed, 0, 0, self.config.batch_size)
            try:
                found = measure_contractions(self.model, batch.images, dtype=self.precision)
            except Exception as error:
                print(f"could not measure contractions; the default rule chooses them: {error}", file=sys.stderr)
                return
            self.contractions = {name: each.faster for each in found for name in each.layers}
            for each in found:
                print(f"contraction {each}", file=sys.stderr)
        set_contractions_(self.model, self.contractions or {})
