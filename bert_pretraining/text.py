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
SPECIALS = 5  # tokens below this one stand for no text, and none of them is ever masked
BYTES = 256  # tokens after the special ones: they spell, in UTF-8, characters that have no token
MOST_WORDS = 2**16 - 1  # uint16 has no more

SPLITS = ("train", "valid", "test")
FORMAT = 1  # of prepared folders
TOKENIZER, PREPARED = "tokenizer.model", "corpus.json"
FILES = (TOKENIZER, *(f"{split}.bin" for split in SPLITS))

_NAMES = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
_COVERAGE = 0.9999  # share of the characters of the text that get tokens; the rest, the rarest ones, are spelled in bytes
_LONGEST = 2**24  # bytes of a line; sentencepiece leaves longer ones out
_CHECKED = 2**28  # bytes; of a larger file only the size is checked when a folder is opened
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space


def sentencepiece() -> Any:
    """The module; raises ValueError where it is not installed, saying how to install it."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(
            "tokenizers need sentencepiece, which is not installed: "
            "python -m pip install -c constraints.txt -e '.[pretraining]' installs it"
        ) from error
    return sentencepiece


def learn_tokenizer(lines: Iterable[str], words: int, *, lower_case: bool = False) -> bytes:
    """Learn byte pair encoding from lines of text; returns the content of a model file of sentencepiece.

    Its ``words`` tokens are the special ones, 256 bytes, characters, and pairs that were merged. No pair crosses a space. Text
    is normalized by sentencepiece's default rule, nmt_nfkc: Unicode NFKC, any white space is one space, and control characters
    are removed; ``lower_case`` folds case as well. The model holds the rule, so that it applies to whatever is encoded.
    The same lines give the same content.

    Raises ValueError where the text allows no vocabulary of this size.
    """
    model = io.BytesIO()
    failures: list[BaseException] = []

    def watched() -> Iterator[str]:
        try:
            yield from lines
        except BaseException as error:  # which sentencepiece turns into another, also Ctrl-C
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
            num_threads=1,  # the model records the number
            minloglevel=2,
        )
    except (RuntimeError, SystemError) as error:
        if failures:
            raise failures[0] from None
        if most := re.search(r"too high .* value <= (\d+)", str(error)):
            raise ValueError(f"a vocabulary of {words} is too large for this text: it allows at most {most[1]}") from error
        if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise ValueError(
                f"a vocabulary of {words} is too small: the special tokens, the {BYTES} bytes and the characters of this text "
                f"need {least[1]}"
            ) from error
        raise ValueError(f"sentencepiece could not learn a tokenizer: {error}") from error
    return model.getvalue()


def load_tokenizer(path: Path) -> Any:
    """The sentencepiece processor of a model file; raises ValueError where it has other special tokens, or no bytes."""
    if not path.is_file():
        raise ValueError(f"there is no tokenizer at {path}")
    tokenizer = sentencepiece().SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path} is no model of sentencepiece: {error}") from error
    expected = [*_NAMES, "<0x00>"]
    first = tokenizer.id_to_piece(list(range(min(len(expected), tokenizer.vocab_size()))))
    if first != expected:
        raise ValueError(f"{path} has the tokens {first} first, expected {expected}: use a tokenizer that prepare.py learned")
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, without BOS and EOS; a line break counts as a space.

    What looks like a special token in a text, such as "<mask>", is text.
    """
    _check(text)
    return tokenizer.encode(text)


def encode_with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text, as of :func:`encode`, and the characters of the text, from start to before end, of each.

    A token's characters do not include the space in front of it, unless the token is that space alone. Where several tokens
    spell one character, or one character is normalized to several ("½" to "1⁄2"), each token has the whole of it. Characters
    that normalization removes belong to the token in front of them. No token has no characters, and starts never decrease.
    """
    _check(text)
    ids = tokenizer.encode(text)
    _, starts = tokenizer.normalize(text, with_offsets=True)  # where each normalized character begins, and the end
    ends = starts[1:]
    for index in range(len(ends) - 2, -1, -1):
        if ends[index] == starts[index]:  # the next one is normalized from the same characters
            ends[index] = ends[index + 1]
    offsets, position = [], 0
    for token, piece in zip(ids, tokenizer.id_to_piece(ids), strict=True):
        if SPECIALS <= token < SPECIALS + BYTES:
            continued = 0x80 <= token - SPECIALS < 0xC0  # by UTF-8: the token before it belongs to the same character
            position += not continued
            first = last = position - 1
        else:
            first = position + (len(piece) > 1 and piece[0] == _SPACE)
            position += len(piece)
            last = position - 1
        offsets.append((starts[first], ends[last]))
    return ids, offsets


def _check(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is half of a surrogate pair, and has no meaning") from error


class Corpus:
    """A folder that prepare.py wrote.

    words:      size of the vocabulary.
    digest:     12 hexadecimal digits that depend on the tokenizer's content.
    tokenizer:  a sentencepiece processor.

    Raises ValueError where a file is missing or has another size or content than it had; of files above 256 MiB the content
    is not checked, which would take seconds.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: bert_pretraining/prepare.py --dest {folder} makes it of text")
        if not (folder / PREPARED).is_file():
            raise ValueError(f"{folder} has no {PREPARED}: it was not written by bert_pretraining/prepare.py")
        facts = read_json(folder / PREPARED)
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            found = facts.get("format") if isinstance(facts, dict) else None
            raise ValueError(f"{folder / PREPARED} has format {found}, and this version reads {FORMAT}: prepare the text again")
        try:
            digests = {name: facts["digests"][name] for name in FILES}
            sizes = {f"{split}.bin": 2 * facts["tokens"][split] for split in SPLITS}
            self.words: int = facts["words"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / PREPARED} is not as it was written ({error}): prepare the text again") from error
        for name in FILES:
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{folder} has no {name}: prepare the text again")
            size = path.stat().st_size
            if size != sizes.get(name, size):
                raise ValueError(f"{path} has {size:,} bytes, expected {sizes[name]:,}: prepare the text again")
            if size <= _CHECKED and digest(path) != digests[name]:
                raise ValueError(f"{path} is not as it was written: prepare the text again")
        self.folder, self.facts = folder, facts
        self.digest: str = digests[TOKENIZER]
        self.tokenizer = load_tokenizer(folder / TOKENIZER)
        if self.tokenizer.vocab_size() != self.words:
            raise ValueError(f"{folder / TOKENIZER} has {self.tokenizer.vocab_size()} words, expected {self.words}")

    def tokens(self, split: str) -> np.memmap:
        """Tokens of "train", "valid" or "test", a memory map of uint16: those of each text, line by line, and EOS after it."""
        return np.memmap(self.folder / f"{split}.bin", dtype="<u2", mode="r")
