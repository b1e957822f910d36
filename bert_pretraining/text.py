"""Text to tokens: sentencepiece tokenizers, character offsets of tokens, and prepared folders. Loads without torch."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.experiments.files import digest, read_json

PAD, UNK, BOS, EOS, MASK = range(5)
SPECIALS = 5  # tokens below this one represent no text, and are never masked
BYTES = 256  # tokens after the special ones, which spell characters without a token in UTF-8
MOST_WORDS = 2**16 - 1  # the limit of uint16

SPLITS = ("train", "valid", "test")
FORMAT = 1  # of prepared folders
TOKENIZER, PREPARED = "tokenizer.model", "corpus.json"
FILES = (TOKENIZER, *(f"{split}.bin" for split in SPLITS))

_NAMES = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
_COVERAGE = 0.9999  # share of the text's characters that get tokens; the rarest characters are spelled in bytes
_LONGEST = 2**24  # bytes of a line; sentencepiece leaves out longer ones
_CHECKED = 2**28  # bytes; for larger files, only the size is checked when a folder is opened
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space


def sentencepiece() -> Any:
    """The module sentencepiece. Raises ValueError saying how to install it if it is missing."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(
            "tokenizers need sentencepiece, which is not installed: "
            "install it with python -m pip install -c constraints.txt -e '.[pretraining]'"
        ) from error
    return sentencepiece


def learn_tokenizer(lines: Iterable[str], words: int, *, lower_case: bool = False) -> bytes:
    """Learn byte pair encoding from lines of text. Returns the content of a sentencepiece model file.

    Its ``words`` tokens are the special ones, 256 bytes, characters, and merged pairs. No pair crosses a space. Text is
    normalized by sentencepiece's default rule, nmt_nfkc: Unicode NFKC, any white space becomes one space, and control
    characters are removed; ``lower_case`` folds case as well. The model stores the rule, so it applies to any encoded text.
    The same lines give the same content.

    Raises ValueError if the text does not allow a vocabulary of this size.
    """
    model = io.BytesIO()
    failures: list[BaseException] = []

    def watched() -> Iterator[str]:
        try:
            yield from lines
        except BaseException as error:  # sentencepiece replaces any exception by its own, even Ctrl-C
            failures.append(error)
            raise

    try:
        sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=watched(),
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
            control_symbols=_NAMES[MASK],
            max_sentence_length=_LONGEST,
            num_threads=1,  # the model file records the number
            minloglevel=2,
        )
    except (RuntimeError, SystemError) as error:
        if failures:
            raise failures[0] from None
        if most := re.search(r"too high .* value <= (\d+)", str(error)):
            raise ValueError(f"a vocabulary of {words} is too large for this text, which allows at most {most[1]}") from error
        if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise ValueError(
                f"a vocabulary of {words} is too small: the special tokens, the {BYTES} bytes and the characters of this text "
                f"need at least {least[1]}"
            ) from error
        raise ValueError(f"sentencepiece could not learn a tokenizer: {error}") from error
    return model.getvalue()


def load_tokenizer(path: Path) -> Any:
    """The sentencepiece processor of a model file. Raises ValueError if it has other special tokens or no bytes."""
    if not path.is_file():
        raise ValueError(f"there is no tokenizer at {path}")
    tokenizer = sentencepiece().SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    expected = [*_NAMES, "<0x00>"]
    first = tokenizer.id_to_piece(list(range(min(len(expected), tokenizer.vocab_size()))))
    if first != expected:
        raise ValueError(f"{path} has the tokens {first} first, expected {expected}: use a tokenizer that prepare.py learned")
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, without BOS and EOS. A line break counts as a space.

    A string in the text that looks like a special token, such as "<mask>", is encoded as text.
    """
    check_encodable(text)
    return tokenizer.encode(text)


def encode_with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text, as in :func:`encode`, and the characters [start, end) of the text that each token covers.

    A token does not cover the space in front of it, unless it is that space alone. If several tokens spell one character, or
    one character is normalized to several ("½" to "1⁄2"), each token covers the whole character. Characters that normalization
    removes belong to the token in front of them. Every token covers at least one character, and starts never decrease.
    """
    check_encodable(text)
    ids = tokenizer.encode(text)
    _, starts = tokenizer.normalize(text, with_offsets=True)  # the start of each normalized character, and the end
    ends = starts[1:]
    for index in range(len(ends) - 2, -1, -1):
        if ends[index] == starts[index]:  # the next one comes from the same characters
            ends[index] = ends[index + 1]
    offsets, position = [], 0
    for token, piece in zip(ids, tokenizer.id_to_piece(ids), strict=True):
        if SPECIALS <= token < SPECIALS + BYTES:
            continued = (
                0x80 <= token - SPECIALS < 0xC0
            )  # a UTF-8 continuation byte, of the same character as the token before it
            position += not continued
            first = last = position - 1
        else:
            first = position + (len(piece) > 1 and piece[0] == _SPACE)
            position += len(piece)
            last = position - 1
        offsets.append((starts[first], ends[last]))
    return ids, offsets


def check_encodable(text: str) -> None:
    """Raise ValueError if a text has half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is half of a surrogate pair, which cannot be encoded") from error


class Corpus:
    """A folder that prepare.py wrote.

    words:      size of the vocabulary.
    digest:     12 hexadecimal digits that identify the tokenizer's content.
    tokenizer:  a sentencepiece processor.

    Raises ValueError if a file is missing, or if its size or content has changed. The content of files above 256 MiB is not
    checked, since that would take seconds.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: bert_pretraining/prepare.py --dest {folder} makes it from text")
        if not (folder / PREPARED).is_file():
            raise ValueError(f"{folder} has no {PREPARED}: it was not written by bert_pretraining/prepare.py")
        facts = read_json(folder / PREPARED)
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            found = facts.get("format") if isinstance(facts, dict) else None
            raise ValueError(f"{folder / PREPARED} has format {found}, but this version reads {FORMAT}: prepare the text again")
        try:
            digests = {name: facts["digests"][name] for name in FILES}
            sizes = {f"{split}.bin": 2 * facts["tokens"][split] for split in SPLITS}
            self.words: int = facts["words"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / PREPARED} has changed since it was written ({error}): prepare the text again"
            ) from error
        for name in FILES:
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{folder} has no {name}: prepare the text again")
            size = path.stat().st_size
            if size != sizes.get(name, size):
                raise ValueError(f"{path} has {size:,} bytes, expected {sizes[name]:,}: prepare the text again")
            if size <= _CHECKED and digest(path) != digests[name]:
                raise ValueError(f"{path} has changed since it was written: prepare the text again")
        self.folder, self.facts = folder, facts
        self.digest: str = digests[TOKENIZER]
        self.tokenizer = load_tokenizer(folder / TOKENIZER)
        if self.tokenizer.vocab_size() != self.words:
            raise ValueError(f"{folder / TOKENIZER} has {self.tokenizer.vocab_size()} words, expected {self.words}")

    def tokens(self, split: str) -> np.memmap:
        """Tokens of "train", "valid" or "test", as a memory map of uint16: the lines of each text, followed by EOS."""
        return np.memmap(self.folder / f"{split}.bin", dtype="<u2", mode="r")
