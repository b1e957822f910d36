"""The training loop, with metrics and checkpoints. If possible, it records the training step as a CUDA graph."""

from __future__ import annotations

import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..composition import Composition
from ..decay import FrobeniusDecay
from . import checkpoints
from .config import differing_values
from .distributed import Processes
from .graph import NotRecorded, Step, StepGraph
from .graph import record as record_graph
from .run_config import RunConfig
from .runs import REQUEUE, Run

_CHECK_EVERY = 50  # steps between checks that losses and weights are finite; a check waits for the device
_AGREE_EVERY = 10  # steps between the exchanges in which processes learn that a signal told another one to stop


class StepHook(Protocol):
    """An object that acts after every optimizer step. ``step`` counts from 0 over the whole run."""

    def after_step(self, step: int) -> None: ...


@runtime_checkable
class EpochHook(Protocol):
    """A hook that also acts before the first step of every epoch. ``epoch`` counts from 0."""

    def before_epoch(self, epoch: int) -> None: ...


@runtime_checkable
class UpdateHook(Protocol):
    """A hook that also acts between the backward pass and the optimizer's step. ``step`` counts from 0."""

    def before_update(self, step: int) -> None: ...


@runtime_checkable
class Stateful(Protocol):
    """A hook whose state is stored in checkpoints."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Feed(Protocol):
    """Batches in their order, from tensors that keep their addresses, so that a recorded step can read them."""

    def start(self, step: int) -> None:
        """Move to a step of the run, counted from 0. :meth:`next` then returns the batch of that step."""

    def next(self) -> Any:
        """The next batch."""


class TrainingLoop(ABC):
    """Trains a model to the end of the run, and writes checkpoints and metrics to the run's directory.

    Subclasses define batches, the loss and the evaluation of a program. This class defines everything else.

    config:           the flags of the run.
    steps_per_epoch:  steps between two evaluations. Each complete epoch ends with an evaluation; every ``save_every`` epochs
                      and at the end of the run, a checkpoint follows.
    last_step:        number of steps of the whole run.
    architecture:     the values from which a program rebuilds the model. Every checkpoint stores them with the weights.
    decay:            Frobenius decay. By default its gradients are added to the others between the backward pass and the
                      optimizer's step. Decoupled decay is applied to the weights just before that step. An optimizer that
                      has the decay as its attribute ``decay`` applies it itself.
    hook:             acts after every step. An :class:`EpochHook` or :class:`UpdateHook` also acts at other times. The state
                      of a :class:`Stateful` hook is stored in checkpoints.
    best_from:        first epoch, counted from 0, whose score may be the best one. Earlier scores do not count, for instance
                      while masks still keep more parameters than the budget.
    epoch_metrics:    called with the learning rate before training and after each epoch. Its results join the metrics.
    first_step:       number of steps that the loops of earlier rounds have made.
    seconds:          time that these earlier steps took.
    record:           records a step and returns a function that replays it (default: as a CUDA graph, on one GPU and without
                      --eager; otherwise steps are not recorded).

    On one GPU, weights are composed in groups (:class:`Composition`), and a step is one CUDA graph, except for batches that
    are not whole. Hooks act between two replays. In four cases, steps run kernel by kernel, and a line on stderr says why:

    - the hook is an :class:`UpdateHook`, which acts within a step;
    - the learning rate is a number, so that a graph would not see it change;
    - under fp16, the optimizer relies on the GradScaler to skip steps whose gradients overflow, which waits for the device;
    - the recording fails.

    A stopped run resumes exactly where it was, because batches depend only on seed and step, and a checkpoint holds everything
    else. SIGTERM, SIGUSR2 and Ctrl-C save a checkpoint after the current step and exit with status 75, so that a scheduler can
    queue the run again. A second Ctrl-C interrupts the run at once. A loss or weight that is not finite ends the run with
    FloatingPointError before it reaches a checkpoint.

    split:            name of the split that is evaluated, as in the names of metrics.
    speed:            name of the metric of speed.
    lower_is_better:  whether a lower score is better.
    """

    split: ClassVar[str] = "test"
    speed: ClassVar[str] = "samples_per_second"
    lower_is_better: ClassVar[bool] = False

    # What a program's loop defines.

    @abstractmethod
    def learning_rate(self) -> float:
        """Learning rate of the current step."""

    @abstractmethod
    def batch(self, step: int) -> Any:
        """This process's part of the batch of a step, counted from 0 over the whole run."""

    @abstractmethod
    def loss_and_sums(self, network: nn.Module, part: Any) -> tuple[Tensor, Tensor]:
        """The loss of a part of a batch, to be minimized, and sums over that part for the metrics.

        The sums are a tensor of shape (3,): loss, correct answers and answers.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics of the split that is evaluated. They include ``loss`` and ``accuracy``."""

    @abstractmethod
    def score(self, evaluated: Mapping[str, float]) -> float:
        """The score: the metric by which epochs are compared."""

    def parts(self, batch: Any) -> Sequence[Any]:
        """The parts of a batch whose gradients are averaged, with equal weights, before the optimizer's step."""
        return (batch,)

    def feed(self) -> Feed | None:
        """The batches for recorded steps. If it is None, no step is recorded."""
        return None

    def is_whole(self, step: int) -> bool:
        """Whether the batch of a step has the size that recorded steps require."""
        return True

    def choose_contractions(self) -> None:  # noqa: B027 (optional to override)
        """Choose how factorized layers are contracted. Called before the first step on one GPU."""

    def before_optimizer(self) -> None:  # noqa: B027 (optional to override)
        """Change the gradients just before the optimizer's step, for instance by clipping. It is part of a recorded step."""

    def samples_per_answer(self) -> float:
        """The number of samples that the metric of speed counts for each answer."""
        return 1.0

    # What all loops share.

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        *,
        config: RunConfig,
        steps_per_epoch: int,
        last_step: int,
        processes: Processes,
        architecture: Mapping[str, Any],
        optimizer: torch.optim.Optimizer,
        decay: FrobeniusDecay | None = None,
        hook: StepHook | None = None,
        epoch_metrics: Callable[[float], dict[str, float]] | None = None,
        best_from: int = 0,
        first_step: int = 0,
        seconds: float = 0.0,
        record: Callable[[Step, Any], Step] | None = None,
    ) -> None:
        self.model, self.run, self.config, self.processes = model, run, config, processes
        self.architecture, self.optimizer = dict(architecture), optimizer
        self.steps_per_epoch, self.last_step = steps_per_epoch, last_step
        self.epochs = -(-last_step // steps_per_epoch)
        self.decay, self.hook, self.epoch_metrics, self.best_from = decay, hook, epoch_metrics, best_from
        self._on_one_gpu = processes.device.type == "cuda" and processes.world_size == 1
        self.precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.amp)
        self._record = record or (record_graph if self._on_one_gpu and not config.eager else None)
        self._eager_because = self._why_eager() if self._record is not None else None
        self._graph: StepGraph | None = None  # made by prepare()
        self.composition: Composition | None = None
        self.contractions: dict[str, str] | None = None  # as measured, by layer
        recorded = self._record is not None and self._eager_because is None
        mode = "reduce-overhead" if self._on_one_gpu and not recorded else None  # torch.compile then makes CUDA graphs itself
        self.network = processes.parallel(cast(nn.Module, torch.compile(model, mode=mode)) if config.compile else model)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.amp == "fp16")
        self.step = first_step  # optimizer steps made so far
        self.best = float("inf") if self.lower_is_better else float("-inf")
        self._gradients_decay = decay is not None and not decay.decoupled and getattr(optimizer, "decay", None) is None
        self._lr: float | None = None  # of the last step
        self.final: dict[str, float] = {}
        self.totals = torch.zeros(3, device=processes.device)  # loss, correct answers and answers of this epoch so far
        self.seconds = seconds
        self._started = time.monotonic()
        self._saved: int | None = None  # step of the last checkpoint
        self._bad = torch.full((), -1, device=processes.device)  # first step whose loss was not finite, or -1
        self._number = torch.zeros((), dtype=torch.int64, device=processes.device)  # of the recorded step, counted from 1
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

        Raises ValueError if it comes from another configuration, seed or program, from other input files or from a later step,
        or if it lacks training state.
        """
        if self.composition is not None:
            raise RuntimeError("load a checkpoint before prepare(), which may take the contractions from the checkpoint")
        if "config" not in state or "optimizer" not in state:
            raise ValueError("the checkpoint to resume from holds no training state: it holds only a model")
        differing = self.run.differing_values(
            {**state["config"], "seed": state["seed"], "max_steps": None},  # the number of steps may change
            {**self.run.config, "seed": self.run.seed, "max_steps": None},
        )
        if differing:
            changes = ", ".join(differing.values())
            raise ValueError(f"the checkpoint to resume from has another configuration: {changes}")
        files = differing_values(state.get("inputs", self.run.inputs), self.run.inputs)
        if files:
            raise ValueError(f"the checkpoint to resume from was made from other files: {', '.join(files.values())}")
        if state["step"] > self.last_step:
            raise ValueError(f"the checkpoint to resume from is at step {state['step']}, past the last step {self.last_step}")
        if isinstance(self.hook, Stateful) and state["hook"] is None:
            raise ValueError(
                "the checkpoint to resume from lacks the state of the step hook: it was made without --dump-frobnorms"
            )
        self.model.load_state_dict(state["model"])
        self._load_optimizer_state(state["optimizer"])
        self.contractions = state.get("contractions")
        self.scaler.load_state_dict(state["scaler"])
        if isinstance(self.hook, Stateful):
            self.hook.load_state_dict(state["hook"])
        self.step, self.best, self.final = state["step"], state["best"], dict(state["final"])
        self._saved = self.step
        if self.processes.main:  # the checkpoint holds the sum over all processes, and the end of the epoch sums again
            self.totals.copy_(state["totals"])
        self.seconds = state["seconds"]
        checkpoints.set_random_state(state["random"])

    def fit(self) -> dict[str, float]:
        """Train to the end. Returns ``final`` and ``best`` (scores), ``final_loss`` and ``seconds``."""
        numbers = [signal.SIGTERM, signal.SIGUSR2]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise the caller handles Ctrl-C
            numbers.append(signal.SIGINT)
        handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        writer = self._tensorboard()
        self._started = time.monotonic()
        self.run.truncate_log(self.step // self.steps_per_epoch if self.step else -1)
        try:
            self.prepare()
            if self.step == 0:
                self._log({"epoch": 0, "step": 0, **self._epoch_metrics(self.learning_rate())}, writer)
            while self.step < self.last_step:
                self._train_epoch(writer)
            if self.step % self.steps_per_epoch:  # --max-steps ended within an epoch; no checkpoint holds this evaluation
                epoch = self.step // self.steps_per_epoch
                self.final = self.evaluate()
                record = {"epoch": epoch + 1, "step": self.step, **self._evaluated()}
                self._log({**record, "partial": True, **self._epoch_metrics(self._rate_of_last_step())}, writer)
        finally:
            self._graph = None  # frees the memory that it holds
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if writer is not None:
                writer.close()
        return {
            "final": self.score(self.final),
            "best": self._better(self.score(self.final)),
            "final_loss": self.final["loss"],
            "seconds": self.seconds + time.monotonic() - self._started,
        }

    def _train_epoch(self, writer: Any) -> None:
        epoch, first = divmod(self.step, self.steps_per_epoch)
        last = min(self.steps_per_epoch, first + self.last_step - self.step)
        before = self.processes.sum(self.totals.clone())[2].item()  # answers of this epoch before a resume
        started = time.monotonic()
        progress = tqdm(
            total=self.steps_per_epoch,
            initial=first,
            desc=f"epoch {epoch + 1}/{self.epochs}",
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
            self.run.heartbeat({"epoch": epoch, "epochs": self.epochs, "step": self.step, "steps": self.last_step})
            if step + 1 < last and self.step % self._agree_every == 0:
                self.stop_if_told()
        progress.close()
        self._check_numbers()
        if last < self.steps_per_epoch:
            self._save()
            return
        loss, correct, answers = self.processes.sum(self.totals).tolist()
        seconds = time.monotonic() - started
        self.totals.zero_()
        self.final = self.evaluate()
        if epoch >= self.best_from:
            self.best = self._better(self.score(self.final))
        lr = self._rate_of_last_step()
        record = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": lr,
            "train_loss": loss / answers,
            "train_accuracy": 100 * correct / answers,
            **self._evaluated(),
            **self._epoch_metrics(lr),
            "seconds": seconds,
            self.speed: (answers - before) * self.samples_per_answer() / seconds,
        }
        self._log(record, writer)
        if self.processes.main:
            accuracies = f"train {record['train_accuracy']:.2f} %, {self.split} {self.final['accuracy']:.2f} %"
            if self.lower_is_better:  # the score is then the loss
                accuracies = f"{self.split} {self.final['loss']:.4f}; accuracy {accuracies}"
            speed = f"lr {lr:g}, {record[self.speed]:.0f} {self.speed.removesuffix('_per_second')}/s"
            where = f"epoch {epoch + 1}/{self.epochs}"
            print(f"{where}: loss {record['train_loss']:.4f}, {accuracies}, {speed}", file=sys.stderr)
        if (epoch + 1) % self.config.save_every == 0 or self.step == self.last_step:
            self._save()
        if self.step < self.last_step:
            self.stop_if_told()

    def prepare(self) -> None:
        """Prepare for the first step on one GPU: choose contractions, group layers to compose, set up the recording of steps.

        On other devices, or with several processes, it only groups layers and sets up the recording, if ``record`` was given.
        """
        if self.composition is not None:
            return
        if not self._on_one_gpu:
            self.contractions = None  # a checkpoint from one GPU holds measured ones; elsewhere the default rule applies
        if self._record is None and not self._on_one_gpu:
            return
        if self._on_one_gpu:
            self.choose_contractions()
        self.composition = Composition(self.model, self.decay if self._gradients_decay else None)
        if self._eager_because is not None:
            self._say_eager()
        elif self._record is not None and (feed := self.feed()) is not None:
            self._feed = feed
            self._graph = StepGraph(self._recorded_step, self._memory, record=self._record)

    def begin_epoch(self) -> None:
        """Prepare the epoch of the next step: learning rate, order of the samples, hook and momentum."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        self._set_rate(always=True)
        if self._graph is not None:
            self._feed.start(self.step)
            self._number.fill_(self.step)
        self.model.train()
        if first == 0 and isinstance(self.hook, EpochHook):
            self.hook.before_epoch(epoch)
        self._start_momentum()

    def next_step(self) -> None:
        """Make the next optimizer step of the epoch. It is a replay if steps are recorded and the batch is whole."""
        self._set_rate()
        if self._graph is not None and self.is_whole(self.step):
            try:
                self._graph()
            except NotRecorded as error:
                self._graph, self._eager_because = None, str(error)
                self._forget_broken_step()
                self._say_eager()
            else:
                self._finish_step()
                return
        self.train_step(self.batch(self.step))

    def train_step(self, batch: Any) -> None:
        """Make one optimizer step without a recording. Its sums are added to ``totals`` on the device."""
        # If other steps are recorded, this batch is smaller, and the compiled network would be compiled again for it.
        self._update(batch, self.step + 1, self.network if self._graph is None else self.model)
        self._finish_step()

    def _recorded_step(self) -> None:
        self._number += 1
        self._update(self._feed.next(), self._number, self.network)

    def _finish_step(self) -> None:
        self.step += 1
        if self.hook is not None:
            self.hook.after_step(self.step - 1)

    def _update(self, batch: Any, number: int | Tensor, network: nn.Module) -> None:
        """Make the optimizer step of a batch. ``number`` counts steps from 1. Nothing here waits for the device."""
        scale = self.scaler.scale(self._one) if self.scaler.is_enabled() else None
        parts = self.parts(batch)
        sums = torch.zeros_like(self.totals)
        self.optimizer.zero_grad()
        for index, part in enumerate(parts):
            last = index + 1 == len(parts)
            waits = not last and isinstance(network, DistributedDataParallel)
            with network.no_sync() if waits else nullcontext():
                composed = nullcontext()
                if self.composition is not None:
                    composed = self.composition.active(self.precision, scale, decays=last)  # once a step
                with composed:
                    with torch.autocast(self.processes.device.type, self.precision) if self.precision else nullcontext():
                        loss, summed = self.loss_and_sums(network, part)
                    self.scaler.scale(loss / len(parts) if len(parts) > 1 else loss).backward()
            sums = sums + summed
        self.scaler.unscale_(self.optimizer)
        self._decay()
        if isinstance(self.hook, UpdateHook):
            self.hook.before_update(self.step)
        self.before_optimizer()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.totals += sums
        self._bad.copy_(torch.where(sums[0].isfinite() | (self._bad >= 0), self._bad, number))

    def _decay(self) -> None:
        """Apply the part of Frobenius decay that neither the composition has added to gradients nor the optimizer applies."""
        if self.decay is not None and self.decay.decoupled:
            self.decay.step(self.optimizer.param_groups[0]["lr"])
        elif self.composition is not None:
            self.composition.decay_rest()
        elif self.decay is not None and self._gradients_decay:
            self.decay.step()

    def _set_rate(self, *, always: bool = False) -> None:
        """Set the optimizer's learning rate to that of the current step."""
        lr = self.learning_rate()
        if lr == self._lr and not always:
            return
        self._lr = lr
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _rate_of_last_step(self) -> float:
        return self.learning_rate() if self._lr is None else self._lr

    def _better(self, score: float) -> float:
        """The better of the best score so far and this score."""
        return min(self.best, score) if self.lower_is_better else max(self.best, score)

    def _evaluated(self) -> dict[str, float]:
        """The latest evaluation, with the split's name as a prefix of each metric."""
        return {f"{self.split}_{name}": value for name, value in self.final.items()}

    def _why_eager(self) -> str | None:
        """The reason why a step cannot be recorded, if it is known before the recording; otherwise None."""
        if isinstance(self.hook, UpdateHook):
            return f"{type(self.hook).__name__} acts between backward and the optimizer's step"
        if not all(isinstance(group["lr"], Tensor) for group in self.optimizer.param_groups):
            return "the optimizer's learning rate is a number, so a graph would not see it change (give a tensor on the GPU)"
        if self.config.amp == "fp16" and not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            return f"under fp16 {type(self.optimizer).__name__} waits to know whether gradients have overflowed (use bf16)"
        return None

    def _forget_broken_step(self) -> None:
        """Reset scaler, gradients and composition after a step that failed to record. It left the parameters unchanged."""
        scaler = torch.amp.GradScaler(self.processes.device.type, enabled=self.scaler.is_enabled())
        scaler.load_state_dict(self.scaler.state_dict())
        self.scaler = scaler
        self.composition = Composition(self.model, self.decay if self._gradients_decay else None)
        self.optimizer.zero_grad()

    def _say_eager(self) -> None:
        print(f"steps are not recorded as a CUDA graph and run kernel by kernel: {self._eager_because}", file=sys.stderr)

    def _memory(self) -> Iterator[Any]:
        """The tensors that a recorded step reads or writes and that outlive it, and the numbers that a recording fixes."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for values in self.optimizer.state.values():
            yield from (value for value in values.values() if isinstance(value, Tensor))
        for group in self.optimizer.param_groups:
            yield group["lr"]
            yield tuple(value for key, value in group.items() if key not in ("params", "lr"))
        yield self.decay.coef if self.decay is not None else None

    def _start_momentum(self) -> None:
        """Create missing momentum buffers, filled with zeros.

        Otherwise, torch's fused SGD leaves them uninitialized if the scaler skips the first step, which it usually does.
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
        """Load the optimizer's state, with momentum in the memory layout of its Parameters.

        The learning rate, and the options that depend on the device (fused, foreach, capturable), keep their present values.
        """
        how = ("lr", "fused", "foreach", "capturable")
        own = [{key: group[key] for key in how if key in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(dict(state))
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                    values[key] = torch.empty_like(parameter).copy_(value)

    def _epoch_metrics(self, lr: float) -> dict[str, float]:
        return self.epoch_metrics(lr) if self.epoch_metrics is not None else {}

    def _check_numbers(self) -> None:
        """Raise FloatingPointError if a weight, or a loss since the last check, is not finite in any process.

        The message says where. Under fp16, a loss may overflow and the scaler then skips the step and lowers the scale. Such a
        loss counts only if the scale has fallen below 1, because lowering it has then not helped.
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
            self.run.heartbeat({"saved_step": self.step}, force=True)
        self._saved = self.step

    def _on_signal(self, number: int, frame: Any) -> None:
        self._told_to_stop = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop_if_told(self) -> None:
        """Save a checkpoint and exit with status 75 if a signal told any process to stop."""
        if self._told_to_stop if self.processes.world_size == 1 else self.processes.any(self._told_to_stop):
            self._check_numbers()
            self._save()
            if self.processes.main:
                print(f"stopped by a signal: saved a checkpoint at step {self.step}", file=sys.stderr)
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
