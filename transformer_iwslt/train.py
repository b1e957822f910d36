"""Train a Transformer, full or factorized, on fairseq: with spectral initialization, Frobenius decay, or neither."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.runs import ROOT, Run, clean_errors, config_hash, read_json, write_json
from transformer_iwslt import engine, generate
from transformer_iwslt.flags import PROGRAM, configuration, fairseq_words, parse
from transformer_iwslt.model import Transformer, TransformerConfig, frobenius_decay
from transformer_iwslt.text import Vocabulary, find_data, find_vocabularies, inputs, keep_vocabulary
from transformer_iwslt.watch import launch


def describe(args: argparse.Namespace, source: Vocabulary, target: Vocabulary) -> dict[str, Any]:
    """What is factorized, how many parameters that leaves, and which of them get which decay."""
    names = TransformerConfig.__dataclass_fields__.keys() & vars(args).keys()
    config = TransformerConfig(len(source), len(target), **{name: getattr(args, name) for name in names})
    model = Transformer(config.without_decomposition())  # fairseq builds the one that is trained, from its seed
    decay = frobenius_decay(model, args.frobenius_decay, args.wd2fd, args.wd2fd_quekey, args.wd2fd_outval)
    covered = [] if decay is None else decay.parameters()
    decays = [{"group": "rest", "tensors": len(list(model.parameters())) - len(covered), "weight_decay": args.weight_decay}]
    if decay is not None:
        decays.append({"group": "factors", "tensors": len(covered), "frobenius_decay": decay.coef})
    return {**model.report.to_dict(), "decays": decays, "report": str(model.report)}


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
    for precision in ("fp16", "bf16"):
        if cfg.common[precision] and gpus == 0:
            raise ValueError(f"--{precision} needs a GPU")
    return cfg


def trained_already(run_of: dict[str, Any], updates: int) -> bool:
    """Whether the run has all its updates; raises ValueError where its checkpoint is damaged, would run code, or has more."""
    path = run_of["path"]
    if (path / generate.TRAINED).exists():
        held = read_json(path / generate.TRAINED)
        if all(held.get(key) == run_of[key] for key in ("config", "seed", "inputs")):
            return True
    if not (path / engine.LAST).exists():
        return False
    made = engine.updates_of(engine.load_checkpoint(path / engine.LAST))
    if made > updates:
        raise ValueError(f"{path} was trained for {made} updates already, more than the {updates} asked for")
    return made == updates


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with clean_errors(f"{PROGRAM}/train.py"):
        args.data = find_data(args.data)
        _, source, target = find_vocabularies(args.data)
        config, description = configuration(args), describe(args, source, target)
        report = description.pop("report")
        if args.dry_run:
            print(json.dumps({"config": {**config, "seed": args.seed}, **description}))
            return
        engine.load()
        path = args.save_dir or ROOT / "results" / PROGRAM / (args.row or "run") / config_hash(config) / f"seed{args.seed}"
        cfg = read_fairseq(args, path)
        run_of: dict[str, Any] = {"path": path, "config": config, "seed": args.seed, "inputs": inputs(args.data)}
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
            launch(cfg, run_of)
        if run.main:
            facts = {key: run_of[key] for key in ("config", "seed", "inputs")}
            facts |= {"row": run.row, "processes": args.distributed_world_size}
            write_json(path / generate.TRAINED, {**facts, **{key: description[key] for key in ("parameters", "decays")}})
        if run.main and args.generate:
            with clean_errors(f"{PROGRAM}/train.py"):
                print(generate.write_result(path, args.data, cpu=args.cpu))


if __name__ == "__main__":
    main()
