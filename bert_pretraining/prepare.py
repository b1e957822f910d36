"""Prepare text for train.py: split it by whole files, learn a tokenizer from the training files, and write the tokens."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

import numpy as np
from tqdm import tqdm

from bert_pretraining import corpora
from bert_pretraining.corpora import Document, Splits
from bert_pretraining.text import (
    BYTES,
    EOS,
    FILES,
    FORMAT,
    MOST_WORDS,
    PREPARED,
    SPECIALS,
    SPLITS,
    TOKENIZER,
    Corpus,
    learn_tokenizer,
    load_tokenizer,
    sentencepiece,
)
from common.experiments.config import FlagParser, exit_on_sigterm, natural, positive_int, say_interrupted
from common.experiments.files import ROOT, digest, read_json, write_atomic, write_json
from common.experiments.runs import clean_errors

PROG = "bert_pretraining/prepare.py"
LEARNED = 2**27  # characters that a tokenizer is learned from, in 600 MB of memory; more text is sampled at regular intervals
_BATCH = 1000  # lines encoded at once
_FOLDERS = {"numbers": "pretraining-numbers", "wikitext-103": "wikitext-103"}  # data-bin/numbers belongs to translation
# Flags that apply to only one source of text, with their defaults.
_OWN: dict[str, dict[str, Any]] = {
    "--text": {"valid": (), "test": ()},
    "--corpus numbers": {"seed": 0, "lines": 30_000},
    "--corpus wikitext-103": {"data_dir": ROOT / "data" / "wikitext-103", "sha256": None},
}


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 0.5:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 0.5, got {text}")
    return value


def _vocabulary(text: str) -> int:
    value = int(text)
    if not SPECIALS + BYTES < value <= MOST_WORDS:
        raise argparse.ArgumentTypeError(
            f"must be above {SPECIALS + BYTES}, the special tokens and all bytes, and at most {MOST_WORDS}, got {text}"
        )
    return value


def parse_prepare(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags. ``source`` is the flag that names the text."""
    parser = FlagParser(prog=PROG, description="Prepare text for train.py.")
    paths: dict[str, Any] = {"nargs": "+", "type": Path, "metavar": "PATH"}
    parser.add_argument(
        "--text",
        **paths,
        help="text to train on: UTF-8 files that end in .txt or .md, or in .gz or .xz, and folders of such files, at any depth",
    )
    parser.add_argument("--valid", **paths, help="files or folders to validate on (default: some of --text)")
    parser.add_argument("--test", **paths, help="files or folders to test on (default: some of --text)")
    parser.add_argument("--corpus", choices=("numbers", "wikitext-103"), help="text that is embedded (numbers) or downloaded")
    parser.add_argument(
        "--held-out",
        type=_share,
        metavar="SHARE",
        help="share of --text or numbers for each held-out split, chosen by a hash of the file's name (default: 0.02)",
    )
    parser.add_argument("--words", type=_vocabulary, metavar="N", help="tokens of the vocabulary (default: 8192; numbers: 512)")
    parser.add_argument("--lower-case", action="store_true", help="fold case; the tokenizer then folds the case of any text")
    parser.add_argument("--lines", type=positive_int, metavar="N", help="sentences of numbers, 60 to 1000000 (default: 30000)")
    parser.add_argument("--seed", type=natural, help="seed of the sentences of numbers (default: 0)")
    parser.add_argument("--data-dir", type=Path, help="folder of WikiText-103's archive (default: data/wikitext-103)")
    parser.add_argument("--sha256", help="SHA-256 that this archive must have; the actual one is printed and recorded")
    parser.add_argument(
        "--dest", type=Path, help="folder to write (default: data-bin/wikitext-103 or data-bin/pretraining-numbers)"
    )
    args = parser.parse_args(argv)
    if (args.text is None) == (args.corpus is None):
        parser.error("give either --text or --corpus")
    args.source = "--text" if args.text else f"--corpus {args.corpus}"
    for source, own in _OWN.items():
        for name, default in own.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif source != args.source:
                parser.error(f"--{name.replace('_', '-')} needs {source}, got {args.source}")
    if args.held_out is not None and (args.corpus == "wikitext-103" or (args.valid and args.test)):
        parser.error("--held-out has nothing to hold out: all three splits are given")
    args.held_out = args.held_out or 0.02
    if args.text and args.dest is None:
        parser.error("--text needs --dest: the folder to write")
    if not 60 <= args.lines <= 10**6:
        parser.error(f"--lines must be from 60 (three documents) to 1000000, got {args.lines}")
    args.words = args.words or (512 if args.corpus == "numbers" else 8192)
    args.dest = (args.dest or ROOT / "data-bin" / _FOLDERS[args.corpus]).resolve()  # replaces the folder, not a link to it
    return args


def progress(what: str, **options: Any) -> tqdm:
    return tqdm(desc=what, unit_scale=True, disable=not sys.stderr.isatty(), **options)


def check(splits: Splits) -> tuple[str, dict[str, int]]:
    """Read all documents. Returns a SHA-256 of names and contents, and the number of characters of each split.

    Raises ValueError naming the first document that is not plain text or that is in two splits.
    """
    found: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)
    seen: dict[str, tuple[str, str]] = {}
    with progress("reading", unit="B") as bar:
        for split in SPLITS:
            for document in splits[split]:
                sha256, size = document.check(bar.update)
                other, place = seen.setdefault(sha256, (split, document.place))
                if other != split:
                    raise ValueError(f"{document.place}, in {split}, has the same content as {place}, in {other}: remove one")
                found[split].append((document.name, sha256))
                characters[split] += size
    return hashlib.sha256(json.dumps(found).encode()).hexdigest(), characters


def read_lines(documents: Sequence[Document], what: str, characters: int) -> Iterator[str]:
    with progress(what, total=characters, unit=" characters") as bar:
        for document in documents:
            for line in document.lines():
                yield line
                bar.update(len(line))


def sample(lines: Iterator[str], share: float) -> Iterator[str]:
    """A share of the lines, at regular intervals."""
    for number, line in enumerate(lines):
        if int((number + 1) * share) > int(number * share):
            yield line


def write_tokens(path: Path, documents: Sequence[Document], tokenizer: Any, characters: int) -> int:
    """Write the tokens of the documents as little-endian uint16, with EOS after each document. Returns their number."""
    count = 0
    with open(path, "wb") as file, progress(f"encoding {path.stem}", total=characters, unit=" characters") as bar:
        for document in documents:
            lines, before = document.lines(), count
            while batch := list(itertools.islice(lines, _BATCH)):
                tokens = list(itertools.chain.from_iterable(tokenizer.encode(batch)))
                file.write(np.array(tokens, "<u2").tobytes())
                count += len(tokens)
                bar.update(sum(map(len, batch)))
            if count == before:
                raise ValueError(f"{document.place} has no tokens: all its characters are ignored; remove it")
            file.write(np.array([EOS], "<u2").tobytes())
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def prepare(
    splits: Splits, characters: dict[str, int], dest: Path, words: int, lower_case: bool, facts: dict[str, Any]
) -> dict[str, int]:
    """Learn a tokenizer and write the folder atomically. Returns the number of tokens of each split."""
    folder = dest.with_name(f".{dest.name}.{os.getpid()}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        lines = read_lines(splits["train"], "learning a tokenizer", characters["train"])
        model = learn_tokenizer(sample(lines, min(1.0, LEARNED / characters["train"])), words, lower_case=lower_case)
        write_atomic(folder / TOKENIZER, model)
        tokenizer = load_tokenizer(folder / TOKENIZER)
        tokens = {split: write_tokens(folder / f"{split}.bin", splits[split], tokenizer, characters[split]) for split in SPLITS}
        record = {
            "format": FORMAT,
            **facts,
            "sentencepiece": version("sentencepiece"),
            "documents": {split: len(splits[split]) for split in SPLITS},
            "characters": characters,
            "tokens": tokens,
            "held_out": {split: [document.name for document in splits[split]] for split in ("valid", "test")},
            "digests": {name: digest(folder / name) for name in FILES},
        }
        write_json(folder / PREPARED, record)
        folder.replace(dest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return tokens


def read(args: argparse.Namespace) -> tuple[Splits, str | None]:
    """The splits that the flags name, and the SHA-256 of their archive, or None if there is no archive."""
    if args.corpus == "wikitext-103":
        return corpora.wikitext(args.data_dir, args.sha256)
    if args.corpus == "numbers":
        return corpora.numbers(args.seed, args.lines, args.held_out), None
    return corpora.read_files(args.text, args.valid, args.test, args.held_out), None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_prepare(argv)
    with clean_errors(PROG):
        sentencepiece()
        splits, archive = read(args)
        sha256, characters = check(splits)
        settings = {"corpus": args.corpus or "text", "words": args.words, "lower_case": args.lower_case, "sha256": sha256}
        if args.dest.exists() and not (args.dest.is_dir() and not any(args.dest.iterdir())):
            held = read_json(args.dest / PREPARED) if (args.dest / PREPARED).exists() else {}
            if not isinstance(held, dict) or any(held.get(key) != value for key, value in settings.items()):
                raise ValueError(
                    f"{args.dest} exists but was prepared with other settings: choose another --dest, or remove it"
                )
            try:
                Corpus(args.dest)
            except ValueError as error:
                raise ValueError(f"{error}; remove {args.dest} first") from error
            print(f"{args.dest} is already prepared: nothing to do", file=sys.stderr)
            return
        tokens = prepare(splits, characters, args.dest, args.words, args.lower_case, {**settings, "archive_sha256": archive})
    where = args.dest.relative_to(ROOT) if args.dest.is_relative_to(ROOT) else args.dest
    counts = [f"{tokens[split]:,} {split} tokens of {len(splits[split]):,} documents" for split in SPLITS]
    print(f"{where}: {args.words:,} words, " + ", ".join(counts) + (f" (archive's SHA-256 {archive})" if archive else ""))


if __name__ == "__main__":
    say_interrupted(PROG)
    exit_on_sigterm()
    main()
