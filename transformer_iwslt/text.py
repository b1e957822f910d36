"""Text to subwords and back: Moses tokenization, lower case and byte pair encoding; vocabularies, and their folders."""

from __future__ import annotations

import codecs
import contextlib
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.experiments.config import config_hash
from common.experiments.files import digest, in_project, read_json, write_atomic, write_json

PREPARED, CODES = "prepare.json", "codes"
VOCABULARY = "vocabulary"  # folder in a run: what translation needs besides the weights
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_JOINER = "@@"


@dataclass(frozen=True)
class Pipeline:
    """How text of a language pair was prepared. ``codes`` are the merges of byte pair encoding, one per line."""

    source_lang: str
    target_lang: str
    lowercase: bool
    codes: str

    @cached_property
    def _bpe(self) -> Any:
        from subword_nmt.apply_bpe import BPE

        return BPE(io.StringIO(self.codes))

    @cached_property
    def _moses(self) -> dict[str, tuple[Any, Any]]:
        from sacremoses import MosesDetokenizer, MosesTokenizer

        return {lang: (MosesTokenizer(lang), MosesDetokenizer(lang)) for lang in (self.source_lang, self.target_lang)}

    def tokenize(self, line: str, lang: str) -> str:
        """Words separated by single spaces, without line breaks, and in lower case if the pipeline says so."""
        line = " ".join(line.split())
        tokens = self._moses[lang][0].tokenize(line, escape=True)
        text = " ".join(" ".join(tokens).split())
        return text.lower() if self.lowercase else text

    def split(self, tokenized: str) -> list[str]:
        """Subwords of a tokenized line."""
        return self._bpe.process_line(tokenized).split()

    def join(self, subwords: Iterable[str]) -> str:
        """Tokenized line of subwords."""
        return (" ".join(subwords) + " ").replace(f"{_JOINER} ", "").strip()

    def detokenize(self, tokenized: str, lang: str) -> str:
        """Plain text of a tokenized line."""
        return self._moses[lang][1].detokenize(tokenized.split())

    def languages(self) -> dict[str, Any]:
        """Everything but the codes."""
        return {"source_lang": self.source_lang, "target_lang": self.target_lang, "lowercase": self.lowercase}

    def save(self, directory: Path, **facts: Any) -> None:
        """Write the pipeline to a folder, with facts on how it was made."""
        write_atomic(directory / CODES, self.codes)
        write_json(directory / PREPARED, {"format": 1, **self.languages(), **facts})

    @staticmethod
    def load(directory: Path) -> Pipeline:
        """The pipeline that a folder holds. Raises ValueError if there is none."""
        for name in (PREPARED, CODES):
            if not (directory / name).exists():
                raise ValueError(f"{directory} has no {name}: it was not written by prepare.py")
        held = read_json(directory / PREPARED)
        try:
            codes = (directory / CODES).read_text(encoding="utf-8")
            return Pipeline(held["source_lang"], held["target_lang"], bool(held["lowercase"]), codes)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{directory / PREPARED} lacks {error}") from error


def split_lines(content: bytes) -> list[bytes]:
    """Lines of a text file without byte order marks and line ends: LF, CR LF, or CR in a file that has no LF before its end."""
    if not content:
        return []
    content = content.removesuffix(b"\n")
    if b"\n" not in content:  # in a file that has LF, a CR within a line does not end it
        content = content.removesuffix(b"\r").replace(b"\r", b"\n")
    # A byte order mark is at the start of a file. Files that were joined from several have one at the start of each part.
    return [line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r") for line in content.split(b"\n")]


def learn_codes(lines: Iterable[str], merges: int) -> str:
    """Learn merges of byte pair encoding on tokenized lines of both languages together.

    Raises ValueError if the lines are too few to learn any.
    """
    from subword_nmt.learn_bpe import learn_bpe

    codes = io.StringIO()
    with contextlib.redirect_stderr(
        sys.stderr if sys.stderr.isatty() else io.StringIO()
    ):  # learn_bpe always draws a progress bar
        try:
            learn_bpe(io.StringIO("".join(line + "\n" for line in lines)), codes, merges)
        except ValueError:  # no word has two letters
            codes = io.StringIO()
    if codes.getvalue().count("\n") < 2:  # the first line is the version
        raise ValueError("no two adjacent letters occur twice in the training pairs: too little text to learn subwords")
    return codes.getvalue()


class Vocabulary:
    """Words of a fairseq dictionary file and their indices; ``<s>``, ``<pad>``, ``</s>`` and ``<unk>`` come first."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*SPECIAL, *words]
        self.index = {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Indices of words, with ``<unk>`` for unknown words and ``</s>`` at the end."""
        unknown = SPECIAL.index("<unk>")
        return [*(self.index.get(word, unknown) for word in words), SPECIAL.index("</s>")]

    def decode(self, indices: Iterable[int]) -> list[str]:
        """Words of indices, without ``<s>``, ``<pad>`` and ``</s>``."""
        return [self.words[index] for index in indices if index >= SPECIAL.index("<unk>")]

    @staticmethod
    def load(path: Path) -> Vocabulary:
        """Read a dictionary file, which has a word and its count per line. Raises ValueError naming the first bad line."""
        if not path.is_file():
            raise ValueError(f"there is no dictionary at {path}")
        words = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            word, _, count = line.rstrip().rpartition(" ")
            if not word or not count.isdigit():
                raise ValueError(f"{path}, line {number}, is not a word and its count: {line!r}")
            words.append(word)
        return Vocabulary(words)


def find_vocabularies(directory: Path) -> tuple[Pipeline, Vocabulary, Vocabulary]:
    """Pipeline, source and target vocabulary of a folder that prepare.py wrote, or of a run's vocabulary folder."""
    pipeline = Pipeline.load(directory)
    return (
        pipeline,
        Vocabulary.load(directory / f"dict.{pipeline.source_lang}.txt"),
        Vocabulary.load(directory / f"dict.{pipeline.target_lang}.txt"),
    )


def find_data(data: Path) -> Path:
    """The prepared folder, as given or below the project's root. Raises ValueError saying how to make it if it is missing."""
    folder = in_project(data)
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {data}: python transformer_iwslt/prepare.py --dest {data} prepares IWSLT'14 there"
        )
    find_vocabularies(folder)
    return folder


def inputs(data: Path) -> dict[str, str]:
    """Digest of a prepared folder, which identifies a run's data. Hidden files do not count, since a run does not read them."""
    files = (path for path in sorted(data.iterdir()) if path.is_file() and not path.name.startswith("."))
    return {"data": config_hash({path.name: digest(path) for path in files})}


def keep_vocabulary(data: Path, run: Path) -> None:
    """Copy the files to a run that translation needs besides the weights."""
    pipeline = Pipeline.load(data)
    (run / VOCABULARY).mkdir(exist_ok=True)
    for name in (PREPARED, CODES, f"dict.{pipeline.source_lang}.txt", f"dict.{pipeline.target_lang}.txt"):
        write_atomic(run / VOCABULARY / name, (data / name).read_bytes())
