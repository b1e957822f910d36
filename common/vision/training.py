"""The training loop of the image programs."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..composition import Composition
from ..contraction import automatic_layers, measure_contractions, set_contractions_
from ..decay import FrobeniusDecay
from ..experiments import checkpoints
from ..experiments.config import differing_values
from ..experiments.distributed import Processes
from ..experiments.runs import REQUEUE, Run
from .config import RunConfig, TrainingConfig
from .data import Batch, Data
from .graph import NotRecorded, Step, StepGraph
from .graph import record as record_graph

_EVALUATION_BATCH = 1000
_CHECK_EVERY = 50  # steps between looking whether a loss or a weight is not finite: looking waits for the device
_AGREE_EVERY = 10  # steps between asking the other processes whether they were told to stop


class StepHook(Protocol):
    """Something that acts after every optimizer step; ``step`` counts from 0 over the whole run."""

    def after_step(self, step: int) -> None: ...


@runtime_checkable
class EpochHook(Protocol):
    """A hook that also acts before the first step of every epoch, counted from 0."""

    def before_epoch(self, epoch: int) -> None: ...


@runtime_checkable
class UpdateHook(Protocol):
    """A hook that also acts between backward and the optimizer's step."""

    def before_update(self, step: int) -> None: ...


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data, processes: Processes) -> dict[str, float]:
    """Accuracy in percent and mean cross-entropy on the test split."""
    model.eval()
    processes.share_buffers(model)
    sums = [torch.zeros(2, device=processes.device)]  # of each batch, left on the device until the last
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


@runtime_checkable
class Stateful(Protocol):
    """A hook whose state checkpoints keep."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def sgd(groups: Sequence[dict[str, Any]], config: TrainingConfig, device: torch.device) -> torch.optim.SGD:
    """SGD with momentum. On a GPU it is fused and its learning rate a tensor there, as a recorded step needs it."""
    if device.type != "cuda":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.SGD(groups, lr=torch.tensor(config.lr, device=device), momentum=config.momentum, fused=True)


class Trainer:
    """Trains a model for ``config.epochs`` epochs and leaves checkpoints and metrics in the run's directory.

    config:        the flags of the run; a copy with other epochs or another seed may be given.
    architecture:  what rebuilds the dense model, kept in every checkpoint beside the weights.
    schedule:      learning rate of an epoch, counted from 0.
    decay:         Frobenius decay, applied between backward and the optimizer's step.
    hook:          acts after every step and, where it is one, as :class:`EpochHook` and :class:`UpdateHook` say; where it
                   is :class:`Stateful`, checkpoints keep its state.
    loss:          from the network and a batch, the loss to minimize and the logits (default: their cross-entropy).
    best_from:     first epoch whose accuracy may be the best one; earlier ones do not count, for instance while masks are
                   still above the budget.
    epoch_metrics: called with the learning rate before training and after each epoch; its numbers join the metrics.
    first_step:    steps made before, by the trainer of an earlier round, and the ``seconds`` that they took.
    record:        how a step is recorded, to be replayed (default: as a CUDA graph, on one GPU and without --eager).

    On one GPU, before the first step, the faster contraction of each factorized layer is measured; weights are then composed
    in groups (:class:`Composition`), and a step is one CUDA graph, but for an epoch's smaller last batch. Hooks act between
    two replays. In three cases steps run kernel by kernel, and one line says why: the hook is an :class:`UpdateHook`, which
    acts within a step; the learning rate is a number, whose changes a graph would not see (:func:`sgd` makes it a tensor);
    recording fails.

    A stopped run resumes exactly where it was: batches are functions of seed, epoch and step, and a checkpoint holds the
    rest. SIGTERM, SIGUSR2 and Ctrl-C save a checkpoint after the current step and exit with status 75, to be queued again;
    a second Ctrl-C interrupts at once. A loss
    or weight that is not finite ends the run with FloatingPointError, before any checkpoint holds it.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        run: Run,
        *,
        config: RunConfig,
        processes: Processes,
        architecture: Mapping[str, Any],
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        decay: FrobeniusDecay | None = None,
        hook: StepHook | None = None,
        epoch_metrics: Callable[[float], dict[str, float]] | None = None,
        loss: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]] | None = None,
        best_from: int = 0,
        first_step: int = 0,
        seconds: float = 0.0,
        record: Callable[[Step, Any], Step] | None = None,
    ) -> None:
        self.model, self.data, self.run, self.config, self.processes = model, data, run, config, processes
        self.architecture, self.optimizer, self.schedule = dict(architecture), optimizer, schedule
        self.decay, self.hook, self.epoch_metrics, self.best_from = decay, hook, epoch_metrics, best_from
        self.loss = loss or _cross_entropy
        self.steps_per_epoch = data.steps_per_epoch(config.batch_size, processes.world_size)
        self.last_step = min(config.epochs * self.steps_per_epoch, config.max_steps or sys.maxsize)
        self._on_one_gpu = processes.device.type == "cuda" and processes.world_size == 1
        if self._on_one_gpu:
            model.to(memory_format=torch.channels_last)  # as the images are
        self._precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.amp)
        self._record = record or (record_graph if self._on_one_gpu and not config.eager else None)
        self._eager_because = self._why_eager() if self._record is not None else None
        self._graph: StepGraph | None = None  # made by prepare()
        self.composition: Composition | None = None
        self.contractions: dict[str, str] | None = None  # as measured, by layer
        recorded = self._record is not None and self._eager_because is None
        mode = "reduce-overhead" if self._on_one_gpu and not recorded else None  # CUDA graphs of torch.compile's own
        self.network = processes.parallel(cast(nn.Module, torch.compile(model, mode=mode)) if config.compile else model)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.amp == "fp16")
        self.step = first_step  # optimizer steps made so far
        self.best = float("-inf")
        self.final: dict[str, float] = {}
        self.totals = torch.zeros(3, device=processes.device)  # loss, correct answers and samples of this epoch so far
        self.seconds = seconds
        self._started = time.monotonic()
        self._saved: int | None = None  # step of the last checkpoint
        self._bad = torch.full((), -1, device=processes.device)  # first step whose loss was not finite
        self._number = torch.zeros((), dtype=torch.int64, device=processes.device)  # of a recorded step, counted from 1
        self._one = torch.ones((), device=processes.device)
        self._told_to_stop = False
        self._agree_every = 1 if processes.world_size == 1 else _AGREE_EVERY

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": checkpoints.FORMAT,
            "config": self.run.config,
            "seed": self.run.seed,
            "inputs": self.run.inputs,
            "architecture": self.architecture,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer_state(),
            "contractions": self.contractions,
            "scaler": self.scaler.state_dict(),
            "hook": self.hook.state_dict() if isinstance(self.hook, Stateful) else None,
            "step": self.step,
            "totals": self.totals.cpu(),
            "best": self.best,
            "final": self.final,
            "random": checkpoints.random_state(),
            "seconds": self.seconds + time.monotonic() - self._started,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint, before :meth:`prepare`.

        Raises ValueError where it is of another configuration, seed or program.
        """
        if self.composition is not None:
            raise RuntimeError("load a checkpoint before prepare(): contractions are chosen there, and may be the checkpoint's")
        if "config" not in state or "optimizer" not in state:
            raise ValueError("the checkpoint to resume from holds no training state: it is a model only")
        differing = self.run.differing_values(
            {**state["config"], "seed": state["seed"], "max_steps": None},  # how far a run goes may change
            {**self.run.config, "seed": self.run.seed, "max_steps": None},
        )
        if differing:
            changes = ", ".join(differing.values())
            raise ValueError(f"the checkpoint to resume from is of another configuration: {changes}")
        files = differing_values(state.get("inputs", self.run.inputs), self.run.inputs)
        if files:
            raise ValueError(f"the checkpoint to resume from was made from other files: {', '.join(files.values())}")
        if state["step"] > self.last_step:
            raise ValueError(f"the checkpoint to resume from is at step {state['step']}, past the last step {self.last_step}")
        if isinstance(self.hook, Stateful) and state["hook"] is None:
            raise ValueError(
                "the checkpoint to resume from lacks what acts after each step: it was made without --dump-frobnorms"
            )
        self.model.load_state_dict(state["model"])
        self._load_optimizer_state(state["optimizer"])
        self.contractions = state.get("contractions")
        self.scaler.load_state_dict(state["scaler"])
        if isinstance(self.hook, Stateful):
            self.hook.load_state_dict(state["hook"])
        self.step, self.best, self.final = state["step"], state["best"], dict(state["final"])
        self._saved = self.step
        if self.processes.main:  # the sum over all processes, which is taken again at the end of the epoch
            self.totals.copy_(state["totals"])
        self.seconds = state["seconds"]
        checkpoints.set_random_state(state["random"])

    def fit(self) -> dict[str, float]:
        """Train to the end; returns final and best test accuracy and final test loss, and the seconds it took."""
        numbers = [signal.SIGTERM, signal.SIGUSR2]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else who runs this program has a handler
            numbers.append(signal.SIGINT)
        handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        writer = self._tensorboard()
        self._started = time.monotonic()
        self.run.truncate_log(self.step // self.steps_per_epoch if self.step else -1)
        try:
            self.prepare()
            if self.step == 0:
                self._log({"epoch": 0, "step": 0, **self._epoch_metrics(0)}, writer)
            while self.step < self.last_step:
                self._train_epoch(writer)
            if self.step % self.steps_per_epoch:  # --max-steps ends within an epoch; no checkpoint keeps this result
                epoch = self.step // self.steps_per_epoch
                self.final = evaluate(self.model, self.data, self.processes)
                record = {"epoch": epoch + 1, "step": self.step, "test_accuracy": self.final["accuracy"]}
                self._log({**record, "partial": True, **self._epoch_metrics(epoch)}, writer)
        finally:
            self._graph = None  # with the memory that it holds
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if writer is not None:
                writer.close()
        return {
            "final": self.final["accuracy"],
            "best": max(self.best, self.final["accuracy"]),
            "final_loss": self.final["loss"],
            "seconds": self.seconds + time.monotonic() - self._started,
        }

    def _train_epoch(self, writer: Any) -> None:
        epoch, first = divmod(self.step, self.steps_per_epoch)
        last = min(self.steps_per_epoch, first + self.last_step - self.step)
        lr = self.schedule(epoch)
        started, before = time.monotonic(), self.processes.sum(self.totals.clone())[2].item()  # samples before a resume
        progress = tqdm(
            total=self.steps_per_epoch,
            initial=first,
            desc=f"epoch {epoch + 1}/{self.config.epochs}",
            leave=False,
            disable=None if self.processes.main else True,
        )
        self.begin_epoch()
        for step in range(first, last):
            self.next_step()
            if self.step % _CHECK_EVERY == 0:
                self._check_numbers()
            progress.update()
            if not progress.disable and self.step % self.config.print_freq == 0:
                progress.set_postfix(loss=f"{(self.totals[0] / self.totals[2]).item():.4f}")
            self.run.heartbeat({"epoch": epoch, "epochs": self.config.epochs, "step": self.step, "steps": self.last_step})
            if step + 1 < last and self.step % self._agree_every == 0:
                self._stop_if_told()
        progress.close()
        self._check_numbers()
        if last < self.steps_per_epoch:
            self._save()
            return
        loss, correct, samples = self.processes.sum(self.totals).tolist()
        seconds = time.monotonic() - started
        self.totals.zero_()
        self.final = evaluate(self.model, self.data, self.processes)
        if epoch >= self.best_from:
            self.best = max(self.best, self.final["accuracy"])
        record = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": lr,
            "train_loss": loss / samples,
            "train_accuracy": 100 * correct / samples,
            "test_loss": self.final["loss"],
            "test_accuracy": self.final["accuracy"],
            **self._epoch_metrics(epoch),
            "seconds": seconds,
            "images_per_second": (samples - before) / seconds,
        }
        self._log(record, writer)
        if self.processes.main:
            accuracies = f"train {record['train_accuracy']:.2f} %, test {record['test_accuracy']:.2f} %"
            speed = f"lr {lr:g}, {record['images_per_second']:.0f} images/s"
            where = f"epoch {epoch + 1}/{self.config.epochs}"
            print(f"{where}: loss {record['train_loss']:.4f}, {accuracies}, {speed}", file=sys.stderr)
        if (epoch + 1) % self.config.save_every == 0 or self.step == self.last_step:
            self._save()
        if self.step < self.last_step:
            self._stop_if_told()

    def prepare(self) -> None:
        """Before the first step, on one GPU: choose contractions, group the layers that compose, and have steps recorded."""
        if self.composition is not None:
            return
        if not self._on_one_gpu:
            self.contractions = None  # of a run on one GPU that is resumed here: here the rule's are taken
        if self._record is None and not self._on_one_gpu:
            return
        if self._on_one_gpu:
            self._choose_contractions()
        self.composition = Composition(self.model, self.decay)
        if self._eager_because is not None:
            self._say_eager()
        elif self._record is not None:
            self._feed = self.data.feed(self.config.batch_size)
            self._graph = StepGraph(self._recorded_step, self._memory, record=self._record)

    def begin_epoch(self) -> None:
        """Get ready for the next step, in its epoch: learning rate, order of the samples, hook."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        lr = self.schedule(epoch)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self._graph is not None:
            self._feed.start(self.config.seed, epoch, first)
            self._number.fill_(self.step)
        self.model.train()
        if first == 0 and isinstance(self.hook, EpochHook):
            self.hook.before_epoch(epoch)
        self._start_momentum()

    def next_step(self) -> None:
        """Make the next optimizer step of the epoch: by replaying it where it is recorded and its batch is a whole one."""
        epoch, step = divmod(self.step, self.steps_per_epoch)
        size = self.config.batch_size
        if self._graph is not None and (step + 1) * size <= len(self.data):
            try:
                self._graph()
            except NotRecorded as error:
                self._graph, self._eager_because = None, str(error)
                self._forget_broken_step()
                self._say_eager()
            else:
                self._finish_step()
                return
        processes = self.processes
        batch = self.data.train_batch(self.config.seed, epoch, step, size, rank=processes.rank, world_size=processes.world_size)
        self.train_step(batch)

    def train_step(self, batch: Batch) -> None:
        """Make one optimizer step. The sums of losses, correct answers and samples join ``totals``, on the device."""
        # Beside recorded steps this is one of a smaller batch, for which the network would be compiled again.
        self._update(batch, self.step + 1, self.network if self._graph is None else self.model)
        self._finish_step()

    def _recorded_step(self) -> None:
        self._number += 1
        self._update(self._feed.next(), self._number, self.network)

    def _finish_step(self) -> None:
        self.step += 1
        if self.hook is not None:
            self.hook.after_step(self.step - 1)

    def _update(self, batch: Batch, number: int | Tensor, network: nn.Module) -> None:
        """Learn from a batch, as step ``number`` counted from 1. Nothing here waits for the device."""
        scale = self.scaler.scale(self._one) if self.scaler.is_enabled() else None
        with self.composition.active(self._precision, scale) if self.composition is not None else nullcontext():
            with torch.autocast(self.processes.device.type, self._precision) if self._precision else nullcontext():
                loss, logits = self.loss(network, batch)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.composition is not None:
            self.composition.decay_rest()
        elif self.decay is not None:
            self.decay.step()
        if isinstance(self.hook, UpdateHook):
            self.hook.before_update(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            samples = torch.full_like(loss, len(batch.labels))
            sums = torch.stack([loss * samples, (logits.argmax(1) == batch.labels).sum().to(loss.dtype), samples])
        self.totals += sums
        self._bad.copy_(torch.where(sums[0].isfinite() | (self._bad >= 0), self._bad, number))

    def _why_eager(self) -> str | None:
        """Why a step cannot be recorded, as far as that is known beforehand."""
        if isinstance(self.hook, UpdateHook):
            return f"{type(self.hook).__name__} acts between backward and the optimizer's step"
        if not all(isinstance(group["lr"], Tensor) for group in self.optimizer.param_groups):
            return "the optimizer's learning rate is a number, whose changes a graph would not see (give a tensor on the GPU)"
        return None

    def _forget_broken_step(self) -> None:
        """Put back what a step that broke off leaves behind in scaler, gradients and composition. Parameters are untouched."""
        scaler = torch.amp.GradScaler(self.processes.device.type, enabled=self.scaler.is_enabled())
        scaler.load_state_dict(self.scaler.state_dict())
        self.scaler = scaler
        self.composition = Composition(self.model, self.decay)
        self.optimizer.zero_grad()

    def _say_eager(self) -> None:
        print(f"steps are not recorded as a CUDA graph and run kernel by kernel: {self._eager_because}", file=sys.stderr)

    def _choose_contractions(self) -> None:
        """Take the contractions of the run that is resumed or, at a start, the faster ones by measurement."""
        if self.contractions is None and automatic_layers(self.model):
            batch = self.data.train_batch(self.config.seed, 0, 0, self.config.batch_size)
            try:
                found = measure_contractions(self.model, batch.images, dtype=self._precision)
            except Exception as error:
                print(f"contractions were not measured, and the rule's are taken: {error}", file=sys.stderr)
                return
            self.contractions = {name: each.faster for each in found for name in each.layers}
            for each in found:
                print(f"contraction {each}", file=sys.stderr)
        set_contractions_(self.model, self.contractions or {})

    def _memory(self) -> Iterator[Any]:
        """What a recorded step reads or writes and that outlives it, with the numbers that a recording keeps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for values in self.optimizer.state.values():
            yield from (value for value in values.values() if isinstance(value, Tensor))
        for group in self.optimizer.param_groups:
            yield group["lr"]
            yield tuple(value for key, value in group.items() if key not in ("params", "lr"))
        yield self.decay.coef if self.decay is not None else None

    def _start_momentum(self) -> None:
        """Give momentum that is not there yet the value zero.

        torch's fused SGD leaves it as the memory happens to be where the scaler skips the first step, as it mostly does.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group.get("fused") and group.get("momentum") else ():
                state = self.optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

    def _optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
        return state

    def _load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load momentum, in the memory layout of its Parameters; how the optimizer works on this device stays as it is."""
        how = ("lr", "fused", "foreach")
        own = [{key: group[key] for key in how if key in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(dict(state))
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                    values[key] = torch.empty_like(parameter).copy_(value)

    def _epoch_metrics(self, epoch: int) -> dict[str, float]:
        return self.epoch_metrics(self.schedule(epoch)) if self.epoch_metrics is not None else {}

    def _check_numbers(self) -> None:
        """Raise FloatingPointError, saying where, if a loss since the last look or a weight is not finite in any process.

        Under fp16 a loss may overflow and the scaler skip the step; that counts once the scale has fallen below 1 in vain.
        """
        state = {name: value for name, value in self.model.state_dict().items() if value.is_floating_point()}
        largest = torch.stack(torch._foreach_norm(list(state.values()), float("inf")))
        skipped = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        bad = -1 if skipped else self.processes.first(int(self._bad))
        self._bad.fill_(-1)
        if bad < 0 and not self.processes.any(not largest.isfinite().all()):
            return
        broken = next((name for name, size in zip(state, largest, strict=True) if not size.isfinite()), None)
        where = f"the loss is not finite at step {bad}" if bad >= 0 else f"the weights are not finite at step {self.step}"
        which = f", and {broken} is the first weight that is not" if broken else ""
        newest = self.run.path / checkpoints.LATEST
        at = "" if self._saved is None else f" at step {self._saved}"
        kept = f"the last good checkpoint is {newest}{at}" if newest.exists() else "no checkpoint was saved yet"
        raise FloatingPointError(f"{where}{which}; {kept}. A lower --lr may help")

    def _save(self) -> None:
        totals = self.processes.sum(self.totals.clone())
        if self.processes.main:
            checkpoints.save(self.run.path, self.state_dict() | {"totals": totals.cpu()})
        self._saved = self.step

    def _on_signal(self, number: int, frame: Any) -> None:
        self._told_to_stop = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _stop_if_told(self) -> None:
        """Where a signal told any process to stop, save a checkpoint and exit."""
        if self._told_to_stop if self.processes.world_size == 1 else self.processes.any(self._told_to_stop):
            self._check_numbers()
            self._save()
            if self.processes.main:
                print(f"told to stop: saved a checkpoint at step {self.step}", file=sys.stderr)
            raise SystemExit(REQUEUE)

    def _tensorboard(self) -> Any:
        if not (self.config.tensorboard and self.processes.main):
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.run.path), purge_step=self.step // self.steps_per_epoch + 1)

    def _log(self, record: dict[str, Any], writer: Any) -> None:
        self.run.log(record)
        if writer is not None:
            for key, value in record.items():
                if key not in ("epoch", "partial"):
                    writer.add_scalar(key, value, record["epoch"])
