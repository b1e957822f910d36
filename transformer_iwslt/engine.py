"""Interface to fairseq: whether it is installed, its command lines and its checkpoints, with clear errors."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy._core import multiarray

from common.experiments import checkpoints
from common.experiments.files import write_atomic
from transformer_iwslt.config import PLUGIN
from transformer_iwslt.model import LONGEST, Transformer, TransformerConfig, from_checkpoint
from transformer_iwslt.text import VOCABULARY, Pipeline, Vocabulary, find_vocabularies

BEST, LAST = "checkpoint_best.pt", "checkpoint_last.pt"  # the best by validation loss; the one that training resumes from


def require() -> None:
    """Raise ValueError if fairseq is not installed. The message says how to get it."""
    if find_spec("fairseq") is None:
        here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
        raise ValueError(
            "fairseq is not installed. Its wheel, ve-fairseq 0.12.3, is for Python 3.11 and 3.12 on Linux x86_64; this is "
            f"{here}. On Linux x86_64, run bash setup.sh with one of these versions. On other systems, use a Linux x86_64 "
            "container, or build ve-fairseq 0.12.3 from source. translate.py and the models do not need fairseq"
        )


def load() -> None:
    """Import fairseq, which is slow, without its import messages and its warnings about other libraries."""
    require()
    os.environ.setdefault("LOGLEVEL", "WARNING")  # each of its programs reads this
    for kind in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", kind)
    logging.disable(logging.INFO)
    import fairseq_cli.generate
    import fairseq_cli.preprocess
    import fairseq_cli.train  # noqa: F401
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    setattr(PathManager, "copy", staticmethod(copy_whole))  # noqa: B010 (as in plugin/optimizer.py)
    setattr(checkpoint_utils, "torch_persistent_save", save_whole)  # noqa: B010
    logging.disable(logging.NOTSET)
    for name in (None, "hydra"):
        logging.getLogger(name).setLevel(logging.WARNING)
    allow_checkpoints()


def loading(words: Sequence[str], gpus: int) -> list[str]:
    """Flags that turn off loader processes on a CPU, unless ``words`` ask for some. There they save no time and end slowly."""
    return [] if gpus or any(word.startswith("--num-workers") for word in words) else ["--num-workers", "0"]


class TooLong(ValueError):
    """A sentence is longer than the model's positions, or than a batch may be."""


@contextlib.contextmanager
def clear_sizes() -> Generator[None]:
    """Turn fairseq's exception about sentences that are too long into :class:`TooLong`."""
    try:
        yield
    except Exception as error:
        if not str(error).startswith(("Size of sample", "Sentences lengths should not exceed")):
            raise
        what = str(error).partition(", skip this example")[0]  # skipping it would leave a sentence out of the score
        raise TooLong(f"a sentence is too long for the model or for --max-tokens: {what}") from error


def sizes(data: Path, split: str) -> np.ndarray:
    """Number of subwords, including </s>, of source and target of each pair of a prepared split: (pairs, 2)."""
    from fairseq.data import data_utils

    pipeline = Pipeline.load(data)
    prefix = data / f"{split}.{pipeline.source_lang}-{pipeline.target_lang}"
    sides = [data_utils.load_indexed_dataset(f"{prefix}.{lang}", None) for lang in (pipeline.source_lang, pipeline.target_lang)]
    return np.stack([side.sizes for side in sides], 1)


def limits(cfg: Any) -> np.ndarray:
    """The most subwords, including </s>, that fairseq's configuration allows for source and target of a pair: (2)."""
    source = sys.maxsize if cfg.task.truncate_source else min(cfg.task.max_source_positions, LONGEST + 1)
    return np.array([source, min(cfg.task.max_target_positions, LONGEST + 1)])


def check_lengths(data: Path, split: str, *, cfg: Any = None, max_tokens: int | None = None) -> None:
    """Raise ValueError, before any work, if a sentence of a prepared split is too long for the model or for a batch.

    ``cfg`` is fairseq's configuration, which may lower the number of positions. ``max_tokens`` is the size of a batch.
    """
    found = sizes(data, split)
    most = np.full(2, LONGEST + 1) if cfg is None else limits(cfg)
    for number, side in np.argwhere(found > np.minimum(most, max_tokens or sys.maxsize)):
        lang = vars(Pipeline.load(data))[("source_lang", "target_lang")[side]]
        size = found[number, side]
        where = f"sentence {number + 1} of {split}.{lang} in {data} has {size:,} subwords, including its end, but"
        if size > most[side]:
            raise ValueError(f"{where} the model reads at most {most[side]:,}: prepare the data again without it")
        raise ValueError(f"{where} a batch holds at most {max_tokens:,}: give a larger --max-tokens")


def left_out(data: Path, cfg: Any) -> str | None:
    """A warning about training pairs that are too long for the model or for a batch, which fairseq leaves out, or None.

    Raises ValueError if no pair is left.
    """
    found = sizes(data, "train")
    most = np.minimum(limits(cfg), cfg.dataset.max_tokens or sys.maxsize)
    count = int((found > most).any(1).sum())
    what = f"{count:,} of {len(found):,} training pairs have more than {most.min():,} subwords, including the end"
    if count == len(found):
        raise ValueError(f"{what}: give a larger --max-tokens")
    return f"{what}: training leaves them out" if count else None


def copy_whole(source: str, target: str, overwrite: bool = False) -> bool:
    """Copy a file atomically. It replaces the function with which fairseq copies checkpoints in place."""
    if overwrite or not os.path.exists(target):
        write_atomic(Path(target), Path(source).read_bytes())
    return True


def save_whole(state: dict[str, Any], filename: str, async_write: bool = False) -> None:
    """Save a checkpoint atomically. It replaces fairseq's function, which tries three times in place if the disk is full."""
    checkpoints.save_file(Path(filename), state)


def strict(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make a parser raise ValueError instead of printing its usage and ending the program."""

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"fairseq: {message}")

    parser.error = refuse
    return parser


def parse(make: Callable[[], argparse.ArgumentParser], words: Sequence[str]) -> argparse.Namespace:
    """Load the plugin and parse a command line for fairseq. Raises ValueError if fairseq refuses it."""
    from fairseq import options, utils

    utils.import_user_module(argparse.Namespace(user_dir=str(PLUGIN)))
    argv, sys.argv = sys.argv, sys.argv[:1]  # fairseq looks for --user-dir here first
    try:
        return options.parse_args_and_arch(strict(make()), list(words))
    finally:
        sys.argv = argv


def configuration(make: Callable[[], argparse.ArgumentParser], words: Sequence[str]) -> Any:
    """fairseq's configuration of a command line. Raises ValueError if fairseq refuses it."""
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    args = parse(make, words)
    try:
        return convert_namespace_to_omegaconf(args)
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"fairseq refuses these flags: {reason}") from error


def allow_checkpoints() -> None:
    """Let torch load fairseq's checkpoints without unpickling code. Besides tensors they hold these plain classes."""
    numbers = [np.dtype, *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32"))]
    arrays = [multiarray.scalar, multiarray._reconstruct, np.ndarray]
    torch.serialization.add_safe_globals([argparse.Namespace, *numbers, *arrays])


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of train.py. Raises ValueError if it is missing, damaged, would run code, or is another program's."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a checkpoint in it, such as {path / BEST}")
    allow_checkpoints()
    state = checkpoints.load(path)
    held = state.get("cfg")
    made_here = isinstance(held, dict) and hasattr(held.get("model"), "rank_scale") and "extra_state" in state
    if not made_here or "model" not in state or not state.get("optimizer_history"):
        raise ValueError(f"{path} is not a checkpoint of transformer_iwslt/train.py")
    return state


def updates_of(state: dict[str, Any]) -> int:
    """Number of updates that a checkpoint was trained for."""
    return state["optimizer_history"][-1]["num_updates"]


def to_transformer(state: dict[str, Any], path: Path) -> Transformer:
    """The model in plain torch, from nothing but a checkpoint that :func:`load_checkpoint` read."""
    weights = {name.replace("coder.net.", "coder.", 1): value for name, value in state["model"].items()}
    flags = vars(state["cfg"]["model"])
    try:
        words = {f"{side}_words": words_of(state, side) for side in ("source", "target")}
        sizes = {field.name: flags[field.name] for field in fields(TransformerConfig) if field.name in flags}
        return from_checkpoint({**sizes, **words}, weights)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} does not hold a Transformer of this program: {error}") from error


def words_of(state: dict[str, Any], side: str) -> int:
    """Size of the "source" or "target" dictionary that a checkpoint was trained with."""
    name = f"{'encoder' if side == 'source' else 'decoder'}.net.embed_tokens"
    tables = [state["model"][key] for key in (f"{name}.weight", f"{name}.u") if key in state["model"]]
    if not tables:
        raise ValueError(f"it lacks {name}")
    return len(tables[0])


def check_vocabulary(state: dict[str, Any], path: Path, folder: Path, source: Vocabulary, target: Vocabulary) -> None:
    """Raise ValueError if the dictionaries of a folder are not those that a checkpoint was trained with."""
    for side, vocabulary in (("source", source), ("target", target)):
        trained = words_of(state, side)
        if len(vocabulary) != trained:
            raise ValueError(
                f"the {side} dictionary of {folder} has {len(vocabulary):,} words, but {path} was trained with {trained:,}: "
                "give the folder that it was trained on"
            )
    kept = path.parent / VOCABULARY
    if kept.is_dir() and kept != folder:
        for side, ours, theirs in zip(("source", "target"), (source, target), find_vocabularies(kept)[1:], strict=True):
            if ours.words != theirs.words:
                raise ValueError(
                    f"the {side} dictionary of {folder} differs from that in {kept}, which {path} was trained with"
                )
