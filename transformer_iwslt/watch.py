"""Watch fairseq's training: metrics of each epoch, a heartbeat, and signals that stop all processes at the same update."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch

from common.experiments.distributed import prepare_cpu
from common.experiments.runs import FAILURES, REQUEUE, Run, clean_errors
from transformer_iwslt import engine
from transformer_iwslt.config import TranslationConfig

LOG = "train.log"


class Watch(logging.Handler):
    """Writes the numbers of each epoch to the run's metrics.jsonl, keeps a heartbeat, and stops training on a signal.

    fairseq reports an epoch only in its log, as ``epoch 003 | valid on 'valid' subset | loss 4.2 | ...``.
    """

    def __init__(self, run: Run, cfg: Any) -> None:
        super().__init__(logging.INFO)
        self.run, self.cfg, self.process = run, cfg, os.getpid()
        self.told = False  # this process received a signal
        self.stopping = False  # all processes know that one was received
        self._agreed = self.updates = -1

    def stop(self, number: int, _: Any) -> None:
        """Handle a signal: stop after an update. Loader processes inherit this handler and end at once."""
        if os.getpid() != self.process:
            os._exit(128 + number)
        self.told = True

    def diverged(self, error: Exception) -> str:
        """Error message for numbers that are not finite; fairseq's log names the layer."""
        last = self.run.path / engine.LAST
        kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was saved yet"
        where = f"not finite at update {self.updates + 1}: {error}"
        return f"{where}; {self.run.path / LOG} names the layer; {kept}. A lower --lr may help"

    def before_step(self, updates: int) -> None:
        self.updates = updates
        self.run.heartbeat({"step": updates, "steps": self.cfg.optimization.max_update})
        if updates != self._agreed:
            self.stopping, self._agreed = any_process(self.told), updates

    def validate_and_save(self, inner: Callable[..., Any], *args: Any) -> Any:
        """Call ``inner``, fairseq's function after an update, or save and stop if a signal was received.

        Training does not stop at an update that is validated anyway, such as the last of an epoch, but at the next one. So a
        stopped run is validated at the same updates as an uninterrupted one, and has the same best checkpoint.
        """
        cfg, trainer, _, epoch_itr, _, end_of_epoch = args
        updates, limit = trainer.get_num_updates(), cfg.optimization.max_update or math.inf
        every = (cfg.dataset.validate_interval_updates, cfg.checkpoint.save_interval_updates)
        if not self.stopping or end_of_epoch or updates >= limit or any(n > 0 and updates % n == 0 for n in every):
            return inner(*args)
        from fairseq import checkpoint_utils

        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
        return [None], True

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "valid":
            return
        from fairseq.logging import metrics

        valid = read_stats(record.getMessage())
        smoothed = metrics.get_smoothed_values("train")
        trained = {name: float(value) for name, value in smoothed.items() if value is not None}
        epoch, step = int(valid.pop("epoch")), int(valid.pop("num_updates"))
        left_out = ("wall", "train_wall", "num_updates")
        self.run.truncate_log(epoch - 1)  # after several validations in an epoch, keep only the latest
        line = {name: value for name, value in trained.items() if name not in left_out}
        self.run.log({"epoch": epoch, "step": step, **line, **{f"valid_{name}": value for name, value in valid.items()}})


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any of the processes that train together."""
    if not torch.distributed.is_initialized():
        return flag
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    value = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return bool(value)


@contextlib.contextmanager
def answering(handler: Callable[[int, Any], None]) -> Generator[None]:
    """Let a function handle SIGTERM and SIGUSR2 if this is the main thread."""
    numbers = (signal.SIGTERM, signal.SIGUSR2) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def read_stats(line: str) -> dict[str, float]:
    """The numbers in a line of fairseq's log."""
    found = {}
    for part in line.split("|"):
        name, _, value = part.strip().rpartition(" ")
        with contextlib.suppress(ValueError):
            found[name] = float(value)
    return found


def train_process(cfg: Any, *, run_of: dict[str, Any]) -> None:
    """Run fairseq's training in this process, watched.

    Exits with status REQUEUE after a signal to stop. If the disk, the numbers or the length of a sentence end the training, it
    exits with status 2 after one line on stderr.
    """
    engine.load()
    if cfg.common.cpu:
        prepare_cpu()
    from fairseq import checkpoint_utils, utils
    from fairseq_cli import train

    utils.import_user_module(cfg.common)
    from transformer_iwslt.plugin.task import ObservedTranslation

    for function in (checkpoint_utils.save_checkpoint, train.should_stop_early):
        vars(function).clear()  # fairseq keeps the best loss there, also across trainings in one process
    main = cfg.distributed_training.distributed_rank == 0
    watch = Watch(Run(**run_of, main=main), cfg)
    log = logging.FileHandler(run_of["path"] / LOG) if main else logging.NullHandler()
    log.setFormatter(logging.Formatter("%(asctime)s | %(name)s | %(message)s"))
    setattr(log, "handleError", lambda record: None)  # noqa: B010 (if the disk is full, the next checkpoint reports it)
    root = logging.getLogger()
    level, handlers, inner = root.level, list(root.handlers), train.validate_and_save
    for handler in handlers:
        handler.setLevel(logging.WARNING)
    root.setLevel(logging.INFO)
    root.handlers = [*handlers, watch, log]
    ObservedTranslation.before_step = watch.before_step
    setattr(train, "validate_and_save", partial(watch.validate_and_save, inner))  # noqa: B010 (as in plugin/optimizer.py)
    try:
        failures = (engine.TooLong, *FAILURES)
        with clean_errors(TranslationConfig.prog(), failures), engine.clear_sizes(), answering(watch.stop):
            try:
                train.main(cfg)
            except FloatingPointError as error:
                raise FloatingPointError(watch.diverged(error)) from error
            if watch.stopping:
                if torch.distributed.is_initialized():
                    torch.distributed.barrier()  # wait for the process that saves
                raise SystemExit(REQUEUE)
    finally:
        setattr(train, "validate_and_save", inner)  # noqa: B010
        ObservedTranslation.before_step = None
        root.setLevel(level)
        root.handlers = handlers
        with contextlib.suppress(OSError):
            log.close()


def launch(cfg: Any, run_of: dict[str, Any]) -> None:
    """Train in this process or, on several GPUs, in one process each. Signals are forwarded to these processes."""
    from fairseq.distributed import utils

    def forward(number: int, _: Any) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    world = cfg.distributed_training
    spawns = world.distributed_world_size > 1 and not world.distributed_no_spawn
    try:
        with answering(forward) if spawns else contextlib.nullcontext():
            utils.call_main(cfg, train_process, run_of=run_of)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.exit_code in (REQUEUE, 2):  # 2: that process has printed the reason
            raise SystemExit(error.exit_code) from error
        raise
