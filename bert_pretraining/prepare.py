"""Prepare text for train.py: split it by whole files, learn a tokenizer, and write the tokens."""

from __future__ import annotations

import gzip
import io
import itertools
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

import numpy as np

from bert_pretraining.text import EOS, FILES, FORMAT, PREPARED, SPLITS, TOKENIZER, learn_tokenizer, load_tokenizer
from common.experiments.config import FlagParser
from common.experiments.files import digest, write_json

OPENERS: dict[str, Callable[..., Any]] = {".txt": open, ".md": open, ".gz": gzip.open, ".xz": lzma.open}
LEARNED = 10**8  # characters that a tokenizer is learned from; of longer text a part of the lines, evenly spread
LONGEST = 2**18  # characters of a line that are encoded at once; longer lines are cut at a space
CHUNK = 2**20


@dataclass(frozen=True)
class Document:
    """A text of a split. ``name`` tells it from others, and ``open`` opens its bytes, UTF-8."""

    name: str
    open: Callable[[], IO[bytes]]

    def lines(self) -> Iterator[str]:
        """Lines, which are cut at a space where they are very long."""
        with self.open() as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
            rest = ""
            while piece := rest + text.readline(LONGEST):
                rest = ""
                if len(piece) >= LONGEST and not piece.endswith("\n"):
                    head, _, tail = piece.rpartition(" ")
                    piece, rest = (head, tail) if head else (piece, "")
                yield piece


Splits = Mapping[str, list[Document]]


def _open(path: Path) -> IO[bytes]:
    return OPENERS[path.suffix.lower()](path, "rb")


def write_tokens(path: Path, documents: Iterable[Document], tokenizer: Any) -> int:
    """Write the tokens of documents as little-endian uint16, EOS after each; returns their number."""
    count = 0
    with open(path, "wb") as file:
        for document in documents:
            lines = document.lines()
            size = 0
            while batch := list(itertools.islice(lines, 1000)):
                for ids in tokenizer.encode(batch, return_type="numpy", num_threads=1):
                    file.write(ids.astype("<u2").tobytes())
                    count += len(ids)
            file.write(np.array([EOS], "<u2").tobytes())
            count += 1
    return count


def main() -> None:
    import time

    parser = FlagParser(prog="x")
    for s in SPLITS:
        parser.add_argument("--text" if s == "train" else f"--{s}", type=Path, nargs="+")
    parser.add_argument("--words", type=int)
    parser.add_argument("--dest", type=Path)
    args = parser.parse_args()
    splits = {s: [Document(p.name, lambda p=p: _open(p)) for p in getattr(args, "text" if s == "train" else s)] for s in SPLITS}
    args.dest.mkdir(parents=True)
    t = time.time()
    model = learn_tokenizer((line for d in splits["train"] for line in d.lines()), args.words)
    print("learn", time.time() - t)
    (args.dest / TOKENIZER).write_bytes(model)
    tok = load_tokenizer(args.dest / TOKENIZER)
    counts = {}
    for s in SPLITS:
        t = time.time()
        counts[s] = write_tokens(args.dest / f"{s}.bin", splits[s], tok)
        print(s, counts[s], time.time() - t)
    write_json(
        args.dest / PREPARED,
        {
            "format": FORMAT,
            "corpus": "text",
            "words": args.words,
            "lower_case": False,
            "tokens": counts,
            "digests": {n: digest(args.dest / n) for n in FILES},
        },
    )


if __name__ == "__main__":
    main()
