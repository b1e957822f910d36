"""Text to tokens: sentencepiece tokenizers, character offsets of tokens, and prepared folders. Loads without torch."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.experiments.files import read_json

PAD, UNK, BOS, EOS, MASK = range(5)
SPECIALS = 5  # ids below this one are no text: they are never masked
BYTES = 256  # ids after the special ones: what stands for a character without a token of its own
MOST_WORDS = 2**16 - 1  # what uint16 holds

SPLITS = ("train", "valid", "test")
FORMAT = 1
TOKENIZER, PREPARED = "tokenizer.model", "corpus.json"
FILES = (TOKENIZER, *(f"{split}.bin" for split in SPLITS))

_NAMES = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
_CHECKED = 2**28  # bytes: the content of larger files is not checked whenever a folder is opened, only their size
_COVERAGE = 0.9999  # share of the characters of the training text that have tokens of their own; others are spelled in bytes
_LONGEST = 2**24  # bytes of a line that sentencepiece learns from; it leaves out longer ones


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(
            "the tokenizer needs sentencepiece, which is not installed: "
            "run python -m pip install -c constraints.txt -e '.[pretraining]'"
        ) from error
    return sentencepiece


def learn_tokenizer(lines: Iterable[str], words: int, *, lower_case: bool = False) -> bytes:
    """Learn byte pair encoding with sentencepiece from lines of text; returns the content of a model file.

    The vocabulary has ``words`` tokens: the special ones, the 256 bytes, characters, and what was merged. The same lines give
    the same bytes: one thread is used, and all lines are read in order. Text is normalized as sentencepiece does it by default:
    Unicode's NFKC, white space to single spaces, control characters removed, and on request lower case.

    Raises ValueError where the vocabulary is too large or too small for the text.
    """
    sentencepiece = _sentencepiece()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=words,
            normalization_rule_name="nmt_nfkc_cf" if lower_case else "nmt_nfkc",
            character_coverage=_COVERAGE,
            byte_fallback=True,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_piece=_NAMES[PAD],
            control_symbols=[_NAMES[MASK]],
            max_sentence_length=_LONGEST,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return model.getvalue()


def load_tokenizer(path: Path) -> Any:
    """The sentencepiece processor of a model file; raises ValueError where it is none with the special tokens used here."""
    processor = _sentencepiece().SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path} is not a model of sentencepiece: {error}") from error
    return processor


class Corpus:
    """A folder that prepare.py wrote.

    words:      size of the vocabulary.
    digest:     12 hexadecimal digits that depend on the tokenizer.
    tokenizer:  a sentencepiece processor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = read_json(folder / PREPARED)
        self.words: int = self.facts["words"]
        self.digest: str = self.facts["digests"][TOKENIZER]

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder / TOKENIZER)

    def tokens(self, split: str) -> np.ndarray:
        """Tokens of "train", "valid" or "test": a memory map of uint16, files one after the other, EOS after each."""
        return np.memmap(self.folder / f"{split}.bin", dtype="<u2", mode="r")
