"""Train a Transformer, full or factorized, on fairseq: with spectral initialization, Frobenius decay, or neither."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from common.runs import REQUEUE, ROOT, Run, clean_errors, config_hash, read_json, write_json
from transformer_iwslt import engine, generate
from transformer_iwslt.flags import PROGRAM, configuration, fairseq_words, parse
from transformer_iwslt.model import Transformer, TransformerConfig, frobenius_decay
from transformer_iwslt.text import CODES, PREPARED, VOCABULARY, Vocabulary, find_vocabularies


def describe(args: argparse.Namespace, source: Vocabulary, target: Vocabulary) -> dict[str, Any]:
    """What is factorized, how many parameters that leaves, and which of them get which decay."""
    names = TransformerConfig.__dataclass_fields__.keys() & vars(args).keys()
    config = TransformerConfig(len(source), len(target), **{name: getattr(args, name) for name in names})
    # What is trained is built by fairseq, from its seed; here it is about shapes, which need no decomposition.
    model = Transformer(replace(config, init="regular", spectral_quekey=False, spectral_outval=False))
    decay = frobenius_decay(model, args.frobenius_decay, args.wd2fd, args.wd2fd_quekey, args.wd2fd_outval)
    covered = [] if decay is None else decay.parameters()
    decays = [{"group": "rest", "tensors": len(list(model.parameters())) - len(covered), "weight_decay": args.weight_decay}]
    if decay is not None:
        decays.append({"group": "factors", "tensors": len(covered), "frobenius_decay": decay.coef})
    return {**model.report.to_dict(), "decays": decays, "report": str(model.report)}


class Watch(logging.Handler):
    """Follows fairseq's training: an epoch's numbers to the run's metrics.jsonl, a heartbeat, and signals to stop.

    fairseq tells an epoch's numbers to its log alone, as ``epoch 003 | valid on 'valid' subset | loss 4.2 | ...``.
    """

    def __init__(self, run: Run, cfg: Any) -> None:
        super().__init__(logging.INFO)
        self.run, self.cfg, self.process = run, cfg, os.getpid()
        self.told = False  # this process was sent a signal
        self.stopping = False  # all processes know of it
        self._agreed = -1

    def stop(self, number: int, _: Any) -> None:
        """Answer a signal: stop after an update. The loader's processes, which inherit this, end at once."""
        if os.getpid() != self.process:
            os._exit(128 + number)
        self.told = True

    def before_step(self, updates: int) -> None:
        self.run.heartbeat({"step": updates, "steps": self.cfg.optimization.max_update})
        if updates != self._agreed:
            self.stopping, self._agreed = any_process(self.told), updates

    def validate_and_save(self, inner: Callable[..., Any], *args: Any) -> Any:
        """fairseq's function after an update, ``inner``; where the run was told to stop, save and say so.

        An update that is validated in any case, at the end of an epoch for one, is no place to stop: the next one is. So a
        run that was stopped is validated where an uninterrupted one is, and has the same best checkpoint.
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
        self.run.truncate_log(epoch - 1)  # an epoch that was validated within has the line of its latest validation
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
    """Let a function answer SIGTERM and SIGUSR2, where this is the main thread."""
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
    """What each process runs: fairseq's training, watched. Exits with REQUEUE where it was told to stop."""
    engine.load()
    from fairseq import checkpoint_utils, utils
    from fairseq_cli import train

    utils.import_user_module(cfg.common)
    from transformer_iwslt.plugin.task import ObservedTranslation

    for function in (checkpoint_utils.save_checkpoint, train.should_stop_early):
        vars(function).clear()  # where fairseq keeps the best loss of a training, and of any before it in this process
    main = cfg.distributed_training.distributed_rank == 0
    watch = Watch(Run(**run_of, main=main), cfg)
    log = logging.FileHandler(run_of["path"] / "train.log") if main else logging.NullHandler()
    log.setFormatter(logging.Formatter("%(asctime)s | %(name)s | %(message)s"))
    root = logging.getLogger()
    level, handlers, inner = root.level, list(root.handlers), train.validate_and_save
    for handler in handlers:
        handler.setLevel(logging.WARNING)
    root.setLevel(logging.INFO)
    root.handlers = [*handlers, watch, log]
    ObservedTranslation.before_step = watch.before_step
    setattr(train, "validate_and_save", partial(watch.validate_and_save, inner))  # noqa: B010 (as in plugin/optimizer.py)
    try:
        with answering(watch.stop):
            train.main(cfg)
            if watch.stopping:
                if torch.distributed.is_initialized():
                    torch.distributed.barrier()  # until the one that saves has saved
                raise SystemExit(REQUEUE)
    finally:
        setattr(train, "validate_and_save", inner)  # noqa: B010
        ObservedTranslation.before_step = None
        root.setLevel(level)
        root.handlers = handlers
        log.close()


def launch(cfg: Any, run_of: dict[str, Any]) -> None:
    """Train in this process or, on several GPUs, in one each, which are told what signals this one receives."""
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
        if error.exit_code == REQUEUE:
            raise SystemExit(REQUEUE) from error
        raise


def read_fairseq(args: argparse.Namespace, path: Path) -> Any:
    """fairseq's configuration of the run; raises ValueError where it cannot train like this here."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    gpus = 0 if args.cpu else torch.cuda.device_count()
    words = [*fairseq_words(args, path), *engine.loading(args.fairseq, gpus)]
    cfg = convert_namespace_to_omegaconf(engine.parse(options.get_training_parser, words))
    world, size = cfg.distributed_training, args.distributed_world_size
    if size > 1 and not world.distributed_no_spawn:
        if size > gpus:
            raise ValueError(
                f"--distributed-world-size {size} needs as many GPUs, and there are {gpus}. On CPUs start one process each, "
                "with --distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp "
                "--distributed-init-method tcp://HOST:PORT --distributed-rank R"
            )
        if world.distributed_init_method is None:  # else fairseq would take the size of a Slurm allocation instead
            with socket.socket() as free:
                free.bind(("localhost", 0))
                world.distributed_init_method = f"tcp://localhost:{free.getsockname()[1]}"
            world.distributed_num_procs = size
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not world.distributed_no_spawn:
        raise ValueError("torchrun is not for this program: --distributed-world-size N starts a process for each of N GPUs")
    if cfg.common.fp16 and gpus == 0:
        raise ValueError("--fp16 needs a GPU")
    return cfg


def trained_already(run_of: dict[str, Any], updates: int) -> bool:
    """Whether the run has all its updates; raises ValueError where its checkpoint is damaged, would run code, or has more."""
    path = run_of["path"]
    if (path / generate.TRAINED).exists():
        held = read_json(path / generate.TRAINED)
        if all(held.get(key) == run_of[key] for key in ("config", "seed", "inputs")):
            return True
    if not (path / generate.LAST).exists():
        return False
    made = engine.load_checkpoint(path / generate.LAST)["optimizer_history"][-1]["num_updates"]
    if made > updates:
        raise ValueError(f"{path} was trained for {made} updates already, more than the {updates} asked for")
    return made == updates


def keep_vocabulary(data: Path, path: Path) -> None:
    """Copy to the run what translate.py needs beside the weights."""
    pipeline, _, _ = find_vocabularies(data)
    (path / VOCABULARY).mkdir(exist_ok=True)
    for name in (PREPARED, CODES, f"dict.{pipeline.source_lang}.txt", f"dict.{pipeline.target_lang}.txt"):
        shutil.copyfile(data / name, path / VOCABULARY / name)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with clean_errors(f"{PROGRAM}/train.py"):
        args.data = generate.find_data(args.data)
        _, source, target = find_vocabularies(args.data)
        config, description = configuration(args), describe(args, source, target)
        report = description.pop("report")
        if args.dry_run:
            print(json.dumps({"config": {**config, "seed": args.seed}, **description}))
            return
        engine.load()
        path = args.save_dir or ROOT / "results" / PROGRAM / (args.row or "run") / config_hash(config) / f"seed{args.seed}"
        cfg = read_fairseq(args, path)
        run_of: dict[str, Any] = {"path": path, "config": config, "seed": args.seed, "inputs": generate.inputs(args.data)}
        run_of |= {"resume": True, "row": args.row, "row_config": args.row_config}
        run = Run(**run_of, main=cfg.distributed_training.distributed_rank == 0)
        if run.finished:
            print(f"{path} holds a finished run of this configuration and seed: nothing to do", file=sys.stderr)
            print(path / "result.json")
            return
        trained = trained_already(run_of, cfg.optimization.max_update)
        run.begin()
    if run.main:
        if not trained:
            (path / generate.TRAINED).unlink(missing_ok=True)  # of fewer updates
        keep_vocabulary(args.data, path)
        told = [f"warning: {warning}" for warning in args.warnings]
        told += [report, *(f"decay: {json.dumps(entry)}" for entry in description["decays"])]
        print(*told, sep="\n", file=sys.stderr)
    with run.recorded():
        if not trained:
            try:
                with engine.clear_sizes():
                    launch(cfg, run_of)
            except engine.TooLong as error:
                fail(error)
        if run.main:
            facts = {key: run_of[key] for key in ("config", "seed", "inputs")}
            facts |= {"row": run.row, "processes": args.distributed_world_size}
            write_json(path / generate.TRAINED, {**facts, **{key: description[key] for key in ("parameters", "decays")}})
        if run.main and args.generate:
            with clean_errors(f"{PROGRAM}/train.py"):
                print(generate.write_result(path, args.data, cpu=args.cpu))


def fail(error: ValueError) -> NoReturn:
    """End with one line, as the errors do that are found before training."""
    with clean_errors(f"{PROGRAM}/train.py"):
        raise error
    raise AssertionError


if __name__ == "__main__":
    main()
