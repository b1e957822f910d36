"""Configurations and runs of the programs that start from a pre-trained encoder. Loads without torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bert_pretraining.config import PretrainingConfig
from common.experiments.config import REQUIRED, Config, derived, flag, non_negative, override, positive_int, share
from common.experiments.files import in_project
from common.experiments.run_config import RunConfig
from common.experiments.runs import Run, run_of

MAX_TOKENS = {"sentences": 128, "squad": 384}  # tokens of a sequence, by task
QUESTION = 64  # most tokens of a question; longer questions are truncated
FRAME = 3  # special tokens around a question and a part of its context


@dataclass(kw_only=True)
class DownstreamConfig(Config):
    """A run that starts from the checkpoint of another."""

    program: ClassVar[str] = "bert_pretraining"
    group: ClassVar[str | None] = "run"

    init_from: Path = flag(
        REQUIRED,
        type=Path,
        metavar="RUN",
        group="",
        input_file=True,
        help="folder of a run of train.py, or a checkpoint in it with tokenizer.model beside it",
    )
    pretraining: str | None = flag(
        None,
        metavar="HASH",
        group="",
        help="configuration hash that the run of --init-from must have, so that rows differ by it",
    )
    seed: int = override(RunConfig, "seed", help="part of the run's name; this program draws no random numbers")
    device: str = override(RunConfig, "device")
    save_dir: Path | None = override(RunConfig, "save_dir")
    resume: str | None = flag(
        None,
        choices=("auto",),
        changes_result=False,
        help="auto: leave a finished run in --save-dir unchanged, and start an unfinished one again",
    )
    row: str | None = override(RunConfig, "row")
    row_config: str | None = override(RunConfig, "row_config")

    def resolve(self) -> None:
        if self.init_from.is_dir():
            self.init_from = self.init_from / "checkpoint.pt"
        super().resolve()


@dataclass(kw_only=True)
class FinetuneConfig(DownstreamConfig):
    """A run of bert_pretraining/finetune.py."""

    script: ClassVar[str] = "finetune.py"
    description: ClassVar[str] = (
        "Fine-tune all weights of a pre-trained encoder to classify sentences, or to answer questions in SQuAD 1.1's format."
    )
    group: ClassVar[str | None] = "fine-tuning"

    seed: int = override(RunConfig, "seed", group="run", help="seed of the last layer's weights, order and dropout")
    task: str = flag(
        REQUIRED, choices=list(MAX_TOKENS), help="sentences: lines of sentence<TAB>label; squad: JSON of SQuAD 1.1"
    )
    train: Path = flag(REQUIRED, type=Path, metavar="FILE", input_file=True, help="training file")
    dev: Path = flag(REQUIRED, type=Path, metavar="FILE", input_file=True, help="file on which the best epoch is chosen")
    test: Path | None = flag(
        None, type=Path, metavar="FILE", input_file=True, help="file on which final and best are measured (default: --dev)"
    )
    max_tokens: int = flag(
        None,
        type=positive_int,
        metavar="N",
        help="tokens per sequence: longer sentences are truncated, and longer contexts split into windows (default: 128, for "
        "squad 384)",
    )
    stride: int = flag(None, type=positive_int, metavar="N", help="squad: tokens from one window to the next (default: 128)")
    epochs: int = flag(3, type=positive_int, metavar="N", help="passes over --train")
    batch_size: int = flag(32, "-b", "--batch-size", type=positive_int, metavar="N", help="sequences per step")
    lr: float = flag(5e-5, "--lr", "--learning-rate", type=non_negative, help="highest learning rate")
    warmup: float = flag(0.1, type=share, help="share of the steps during which the learning rate rises; then it falls to 0")
    weight_decay: float = flag(
        0.01, "--weight-decay", "--wd", type=non_negative, help="weight decay of all weights except norms and biases"
    )
    dropout: float = flag(0.1, type=share, help="dropout in the encoder and before the classifier")

    def resolve(self) -> None:
        self.train, self.dev = in_project(self.train), in_project(self.dev)
        self.test = None if self.test is None else in_project(self.test)
        super().resolve()
        self.max_tokens = self.max_tokens or MAX_TOKENS[self.task]
        if self.task == "sentences":
            if self.stride is not None:
                raise ValueError(f"--stride {self.stride} needs --task squad: sentences have no windows")
            if self.max_tokens < FRAME:
                raise ValueError(f"--max-tokens must be at least {FRAME}, got {self.max_tokens}")
            return
        room = self.max_tokens - QUESTION - FRAME  # for context beside the longest question
        if room < 1:
            raise ValueError(f"--max-tokens must be above {QUESTION + FRAME}, which questions take, got {self.max_tokens}")
        self.stride = self.stride or min(128, room)
        if self.stride > room:
            raise ValueError(
                f"--stride {self.stride} leaves out context: with --max-tokens {self.max_tokens} it must be at most {room}"
            )

    def files(self) -> dict[str, Path]:
        """The files by split: train, dev and, if given, test."""
        found = {"train": self.train, "dev": self.dev, "test": self.test}
        return {split: path for split, path in found.items() if path is not None}

    def run_name(self) -> str:
        return f"finetune-{self.task}"


@dataclass(kw_only=True)
class BlimpConfig(DownstreamConfig):
    """A run of bert_pretraining/blimp.py."""

    script: ClassVar[str] = "blimp.py"
    description: ClassVar[str] = (
        "Test whether a pre-trained encoder prefers the grammatical one of two sentences (BLiMP), by pseudo-log-likelihood."
    )
    group: ClassVar[str | None] = "scoring"

    data: Path = flag(
        REQUIRED,
        type=Path,
        metavar="PATH",
        changes_result=False,
        help="BLiMP: a folder of .jsonl files, one such file, or a .tsv(.xz) of field, term, paradigm, good and bad sentence",
    )
    pairs: int | None = flag(None, type=positive_int, metavar="N", help="only the first N pairs of each paradigm")
    end_token: bool = flag(
        False,
        before=True,
        help="put </s> after each sentence, as the first committed runs did; pre-training has it only between documents",
    )
    batch_size: int = flag(
        256,
        "-b",
        "--batch-size",
        type=positive_int,
        metavar="N",
        changes_result=False,
        help="sequences scored at once",
    )
    score: str = derived(REQUIRED)  # distinguishes the configuration from those of other programs

    def resolve(self) -> None:
        self.data = in_project(self.data)
        super().resolve()
        self.score = "pseudo-log-likelihood"

    def input_paths(self) -> dict[str, Path]:
        files = (
            {f"data/{path.name}": path for path in sorted(self.data.glob("*.jsonl"))}
            if self.data.is_dir()
            else {"data": self.data}
        )
        return super().input_paths() | files

    def run_name(self) -> str:
        return "blimp"


SCRIPTS: dict[str, type[Config]] = {kind.script: kind for kind in (PretrainingConfig, FinetuneConfig, BlimpConfig)}


def open_run(config: DownstreamConfig) -> Run | None:
    """The run of a configuration, checked and not begun, or None if there is nothing to do.

    There is nothing to do if the run has finished, in which case its result is printed, or if this is not the first of several
    processes of torchrun.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if int(os.environ.get("RANK", "0")) > 0:
            return None
        print(f"{config.prog()} runs in one process: the other processes do nothing", file=sys.stderr)
    run = run_of(config)
    if not run.finished:
        return run
    run.say_finished()
    return None
