"""Train a Transformer, full or factorized, on fairseq: with spectral initialization, Frobenius decay, or neither."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.runs import REQUEUE, ROOT, Run, clean_errors, config_hash, write_json
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
        self.run, self.cfg, self.stopping = run, cfg, False
        for number in (signal.SIGTERM, signal.SIGUSR2):
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, self._stop)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def before_step(self, updates: int) -> None:
        self.run.heartbeat({"step": updates, "steps": self.cfg.optimization.max_update})
        if self.stopping:
            # After this update fairseq takes its time to be over: it saves a checkpoint, within an epoch too, and returns.
            self.cfg.optimization.stop_time_hours = 1e-12
            self.cfg.dataset.disable_validation = True

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "valid" or self.stopping:
            return
        valid = read_stats(record.getMessage())
        from fairseq.logging import metrics

        smoothed = metrics.get_smoothed_values("train")
        trained = {name: float(value) for name, value in smoothed.items() if value is not None}
        epoch, step = int(valid.pop("epoch")), int(valid.pop("num_updates"))
        left_out = ("wall", "train_wall", "num_updates")
        self.run.truncate_log(epoch - 1)  # an epoch that was validated within has the line of its latest validation
        line = {name: value for name, value in trained.items() if name not in left_out}
        self.run.log({"epoch": epoch, "step": step, **line, **{f"valid_{name}": value for name, value in valid.items()}})


def read_stats(line: str) -> dict[str, float]:
    """The numbers in a line of fairseq's log, plain or JSON."""
    parts = (
        json.loads(line).items() if line.startswith("{") else [part.strip().rpartition(" ")[::2] for part in line.split("|")]
    )
    found = {}
    for name, value in parts:
        with contextlib.suppress(ValueError):
            found[name.strip().removeprefix("valid_")] = float(value)
    return found


def train_process(cfg: Any, *, run_of: dict[str, Any]) -> None:
    """What each process runs: fairseq's training, watched. Exits with REQUEUE where it was told to stop."""
    engine.load()
    from fairseq import checkpoint_utils, utils
    from fairseq_cli import train
    from omegaconf import OmegaConf

    utils.import_user_module(cfg.common)
    from transformer_iwslt.plugin.task import ObservedTranslation

    OmegaConf.set_struct(cfg, False)
    for function in (checkpoint_utils.save_checkpoint, train.should_stop_early):
        vars(function).clear()  # where fairseq keeps the best loss of a training, and of any before it in this process
    main = cfg.distributed_training.distributed_rank == 0
    watch = Watch(Run(**run_of, main=main), cfg)
    log = logging.FileHandler(run_of["path"] / "train.log") if main else logging.NullHandler()
    log.setFormatter(logging.Formatter("%(asctime)s | %(name)s | %(message)s"))
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    for handler in handlers:
        handler.setLevel(logging.WARNING)
    root.setLevel(logging.INFO)
    root.handlers = [*handlers, watch, log]
    ObservedTranslation.before_step = watch.before_step
    try:
        train.main(cfg)
    finally:
        ObservedTranslation.before_step = None
        root.setLevel(level)
        root.handlers = handlers
        log.close()
    if watch.stopping:
        raise SystemExit(REQUEUE)


def launch(cfg: Any, run_of: dict[str, Any]) -> None:
    """Train in this process or, on several GPUs, in one each."""
    from fairseq.distributed import utils

    try:
        utils.call_main(cfg, train_process, run_of=run_of)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.exit_code == REQUEUE:
            raise SystemExit(REQUEUE) from error
        raise


def read_fairseq(args: argparse.Namespace, path: Path) -> Any:
    """fairseq's configuration of the run; raises ValueError where it cannot train like this here."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    cfg = convert_namespace_to_omegaconf(engine.parse(options.get_training_parser, fairseq_words(args, path)))
    world = cfg.distributed_training
    gpus = 0 if args.cpu else torch.cuda.device_count()
    if world.distributed_world_size > max(1, gpus) and not world.distributed_no_spawn:
        raise ValueError(
            f"--distributed-world-size {world.distributed_world_size} needs as many GPUs, and there are {gpus}. On CPUs start "
            "one process each, with --distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp "
            "--distributed-init-method tcp://HOST:PORT --distributed-rank R"
        )
    if cfg.common.fp16 and gpus == 0:
        raise ValueError("--fp16 needs a GPU")
    return cfg


def trained_already(path: Path, updates: int) -> bool:
    """Whether the checkpoint of a run has all its updates; raises ValueError where it is damaged or would run code."""
    if not (path / generate.LAST).exists():
        return False
    history = engine.load_checkpoint(path / generate.LAST)["optimizer_history"]
    return history[-1]["num_updates"] >= updates


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
        run_of: dict[str, Any] = {
            "path": path,
            "config": config,
            "seed": args.seed,
            "inputs": generate.inputs(args.data),
            "resume": True,
        }
        run_of |= {"row": args.row, "row_config": args.row_config}
        run = Run(**run_of, main=cfg.distributed_training.distributed_rank == 0)
        if run.finished:
            print(f"{path} holds a finished run of this configuration and seed: nothing to do", file=sys.stderr)
            print(path / "result.json")
            return
        trained = (path / generate.TRAINED).exists() or trained_already(path, cfg.optimization.max_update)
        run.begin()
    if run.main:
        keep_vocabulary(args.data, path)
        told = [f"warning: {warning}" for warning in args.warnings]
        told += [report, *(f"decay: {json.dumps(entry)}" for entry in description["decays"])]
        print(*told, sep="\n", file=sys.stderr)
    with run.recorded():
        if not trained:
            launch(cfg, run_of)
        if run.main:
            facts = {key: run_of[key] for key in ("config", "seed", "inputs")}
            facts |= {"row": run.row, "processes": args.distributed_world_size}
            write_json(path / generate.TRAINED, {**facts, **{key: description[key] for key in ("parameters", "decays")}})
        if run.main and args.generate:
            print(generate.write_result(path, args.data, cpu=args.cpu))


if __name__ == "__main__":
    main()
