"""Train a full or factorized Transformer with fairseq, with or without spectral initialization and Frobenius decay."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from common.experiments.config import completed, say_interrupted
from transformer_iwslt.config import TranslationConfig

if __name__ == "__main__":
    say_interrupted(TranslationConfig.prog())
    TranslationConfig.parse()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

import torch

from common.experiments.files import read_json, write_json
from common.experiments.runs import Run, clean_errors, directory_of
from transformer_iwslt import engine, generate
from transformer_iwslt.model import Transformer, TransformerConfig, frobenius_decay
from transformer_iwslt.text import Vocabulary, find_data, find_vocabularies, inputs, keep_vocabulary
from transformer_iwslt.watch import launch


def describe(config: TranslationConfig, source: Vocabulary, target: Vocabulary) -> dict[str, Any]:
    """The factorized layers, the numbers of parameters, and the decay of each group of tensors."""
    names = TransformerConfig.__dataclass_fields__.keys() & vars(config).keys()
    sizes = TransformerConfig(len(source), len(target), **{name: getattr(config, name) for name in names})
    model = Transformer(sizes.without_decomposition())  # fairseq builds the trained model itself, with its seed
    decay = frobenius_decay(model, config.frobenius_decay, config.wd2fd, config.wd2fd_quekey, config.wd2fd_outval)
    covered = [] if decay is None else decay.parameters()
    decays = [{"group": "rest", "tensors": len(list(model.parameters())) - len(covered), "weight_decay": config.weight_decay}]
    if decay is not None:
        decays.append({"group": "factors", "tensors": len(covered), "frobenius_decay": decay.coef})
    return {**model.report.to_dict(), "decays": decays, "report": str(model.report)}


def read_fairseq(config: TranslationConfig, path: Path, target_words: int) -> Any:
    """fairseq's configuration of the run. Raises ValueError if fairseq cannot train with it on this computer."""
    from fairseq import options

    gpus = 0 if config.cpu else torch.cuda.device_count()
    words = [*config.fairseq_words(path), *engine.loading(config.fairseq, gpus)]
    cfg = engine.configuration(options.get_training_parser, words)
    if config.smoothed_over == "all":  # fairseq spreads it over the other words: leave out the share of the correct word
        cfg.criterion.label_smoothing *= 1 - 1 / target_words
    world, size = cfg.distributed_training, config.distributed_world_size
    if size > 1 and not world.distributed_no_spawn:
        if size > gpus:
            raise ValueError(
                f"--distributed-world-size {size} needs as many GPUs, and there are {gpus}. On CPUs, start each process "
                "yourself, with --distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp "
                "--distributed-init-method tcp://HOST:PORT --distributed-rank R"
            )
        if world.distributed_init_method is None:  # otherwise fairseq would use the size of a Slurm allocation
            with socket.socket() as free:
                free.bind(("localhost", 0))
                world.distributed_init_method = f"tcp://localhost:{free.getsockname()[1]}"
            world.distributed_num_procs = size
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not world.distributed_no_spawn:
        raise ValueError(
            "this program cannot run under torchrun: --distributed-world-size N starts a process for each of N GPUs"
        )
    for precision in ("fp16", "bf16"):
        if cfg.common[precision] and gpus == 0:
            raise ValueError(f"--{precision} needs a GPU")
    cfg.common.tpu = False  # fairseq takes --bf16 as a sign of a TPU
    return cfg


def trained_already(run_of: dict[str, Any], updates: int) -> bool:
    """Whether the run has made all updates. Raises ValueError if its checkpoint is damaged, would run code, or has more."""
    path = run_of["path"]
    if (path / generate.TRAINED).exists():
        held = read_json(path / generate.TRAINED)
        same = all(held.get(key) == run_of[key] for key in ("seed", "inputs"))
        if same and completed(TranslationConfig, held["config"]) == run_of["config"]:
            return True
    if not (path / engine.LAST).exists():
        return False
    made = engine.updates_of(engine.load_checkpoint(path / engine.LAST))
    if made > updates:
        raise ValueError(f"{path} was already trained for {made} updates, more than the {updates} requested")
    return made == updates


def main(argv: Sequence[str] | None = None) -> None:
    config = TranslationConfig.parse(argv)
    with clean_errors(config.prog()):
        config.data = find_data(config.data)
        _, source, target = find_vocabularies(config.data)
        record, description = config.record(), describe(config, source, target)
        report = description.pop("report")
        if config.dry_run:
            print(json.dumps({"config": {**record, "seed": config.seed}, **description}))
            return
        engine.load()
        path = directory_of(config)
        cfg = read_fairseq(config, path, len(target))
        if not cfg.dataset.skip_invalid_size_inputs_valid_test:
            engine.check_lengths(config.data, "valid", cfg=cfg, max_tokens=cfg.dataset.max_tokens_valid)
        engine.check_lengths(config.data, "test")
        told = [*config.warnings, *filter(None, [engine.left_out(config.data, cfg)])]
        run_of: dict[str, Any] = {"path": path, "config": record, "seed": config.seed, "inputs": inputs(config.data)}
        run_of |= {"kind": TranslationConfig, "resume": True, "row": config.row, "row_config": config.row_config}
        run = Run(**run_of, main=cfg.distributed_training.distributed_rank == 0)
        if run.finished:
            run.say_finished()
            return
        trained = trained_already(run_of, cfg.optimization.max_update)
        run.begin()
    if run.main:
        if not trained:
            (path / generate.TRAINED).unlink(missing_ok=True)  # from a run of fewer updates
        keep_vocabulary(config.data, path)
        told = [f"warning: {warning}" for warning in told]
        told += [report, *(f"decay: {json.dumps(entry)}" for entry in description["decays"])]
        print(*told, sep="\n", file=sys.stderr)
    with run.recorded():
        if not trained:
            launch(cfg, run_of)
        if run.main:
            facts = {key: run_of[key] for key in ("config", "seed", "inputs")}
            facts |= {"row": run.row, "processes": config.distributed_world_size}
            write_json(path / generate.TRAINED, {**facts, **{key: description[key] for key in ("parameters", "decays")}})
        if run.main and config.generate:
            with clean_errors(config.prog()):
                print(generate.write_result(path, config.data, cpu=config.cpu))
        elif run.main:
            print(f"trained: transformer_iwslt/generate.py --path {path}/checkpoint_best.pt writes the result", file=sys.stderr)


if __name__ == "__main__":
    main()
