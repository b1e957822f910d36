"""Prepare sentence pairs for train.py: tokenize, clean, split, learn subwords, and write fairseq's binary files."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from common.experiments.config import exit_on_sigterm, say_interrupted
from transformer_iwslt.config import parse_prepare, refuse_separator

if __name__ == "__main__":
    say_interrupted("transformer_iwslt/prepare.py")
    parse_prepare()  # --help and wrong flags are answered before torch, which takes seconds, is loaded

from tqdm import tqdm

from common.experiments.files import ROOT, read_json, write_atomic
from common.experiments.runs import clean_errors
from transformer_iwslt import corpora, engine
from transformer_iwslt.corpora import Pairs, Splits
from transformer_iwslt.model import LONGEST
from transformer_iwslt.text import CODES, PREPARED, Pipeline, learn_codes

SPLITS = ("train", "valid", "test")
USUAL_FACTOR = 8  # fairseq's factor; folders that record none have it, such as those prepared before --padding-factor existed
MAX_WORDS, MAX_RATIO, VALID_EVERY = 175, 1.5, 23  # preparation of IWSLT'14: longest sentence, length ratio, validation split


def clean(pairs: Pairs) -> Pairs:
    """The pairs whose sentences have 1 to 175 words and whose lengths differ by at most a factor of 1.5."""

    def keep(source: int, target: int) -> bool:
        return min(source, target) >= 1 and max(source, target) <= min(MAX_WORDS, MAX_RATIO * min(source, target))

    return [(source, target) for source, target in pairs if keep(len(source.split()), len(target.split()))]


def split_off(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """Split pairs into training and validation pairs: every 23rd pair validates."""
    valid = pairs[VALID_EVERY - 1 :: VALID_EVERY]
    return [pair for number, pair in enumerate(pairs, 1) if number % VALID_EVERY], valid


def tokenize(pairs: Pairs, pipeline: Pipeline, name: str) -> Pairs:
    progress = tqdm(pairs, desc=f"tokenizing {name}", disable=not sys.stderr.isatty())
    sides = (pipeline.source_lang, pipeline.target_lang)
    return [(pipeline.tokenize(source, sides[0]), pipeline.tokenize(target, sides[1])) for source, target in progress]


def binarize(directory: Path, pipeline: Pipeline, padding_factor: int) -> None:
    """Write fairseq's dictionaries and binary files from the text files of the splits in ``directory``.

    fairseq adds made-up words until the size of a dictionary is a multiple of ``padding_factor``.
    """
    words = ["--padding-factor", str(padding_factor)]
    words += ["--source-lang", pipeline.source_lang, "--target-lang", pipeline.target_lang, "--destdir", str(directory)]
    for split in SPLITS:
        words += [f"--{split}pref", str(directory / "text" / split)]
    from fairseq import options
    from fairseq_cli import preprocess

    args = engine.strict(options.get_preprocessing_parser()).parse_args(words)
    with contextlib.redirect_stdout(io.StringIO()):
        preprocess.main(args)


def check_lengths(split: Pairs, place: Callable[[int, int], str]) -> None:
    """Raise ValueError if a sentence has more subwords than the model reads; ``place`` says where it came from.

    BLEU and the validation loss are those of a whole split, so no sentence may be left out.
    """
    for number, pair in enumerate(split):
        for side, sentence in enumerate(pair):
            if (size := len(sentence.split())) > LONGEST:
                raise ValueError(
                    f"{place(number, side)} has {size:,} subwords, but the model reads at most {LONGEST:,}: shorten or remove "
                    "this pair"
                )


def place_in_file(args: argparse.Namespace, splits: Splits, name: str, number: int, side: int) -> str:
    """Where a sentence of a split came from, in words; ``number`` counts from 0 and skips pairs of empty lines."""
    prefix = getattr(args, f"{name}_prefix")
    if prefix is None or number >= len(splits[name]):
        return f"{name} sentence {number + 1}"
    path = prefix.with_name(f"{prefix.name}.{(args.source_lang, args.target_lang)[side]}")
    return f"{path}, line {corpora.read_lines(path).index(splits[name][number][side]) + 1},"


def prepare(
    splits: Splits, pipeline: Pipeline, dest: Path, facts: dict[str, Any], place: Callable[[str, int, int], str]
) -> dict[str, int]:
    """Tokenize the splits and write the folder atomically. Returns the number of pairs of each split.

    If there is no validation split, as with IWSLT'14, the training pairs are cleaned and part of them validates.
    ``references.test`` holds the original target sentences, for BLEU of plain text. Raises ValueError if a sentence of the
    validation or test split is too long for the model; ``place`` says where it came from, by split, number and side.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after the work, if it is a file
    tokenized = {name: tokenize(splits[name], pipeline, name) for name in SPLITS}
    if not tokenized["valid"]:
        tokenized["train"], tokenized["valid"] = split_off(clean(tokenized["train"]))
    for name in SPLITS:
        if not tokenized[name]:
            raise ValueError(f"no {name} pair is left: sentences must have 1 to {MAX_WORDS} words and similar lengths")
    text = [line for side in (0, 1) for line in (pair[side] for pair in tokenized["train"])]
    pipeline = Pipeline(pipeline.source_lang, pipeline.target_lang, pipeline.lowercase, learn_codes(text, facts["merges"]))
    subwords = {
        name: [(" ".join(pipeline.split(source)), " ".join(pipeline.split(target))) for source, target in tokenized[name]]
        for name in SPLITS
    }
    for name in ("valid", "test"):
        check_lengths(subwords[name], partial(place, name))
    long = sum(max(len(sentence.split()) for sentence in pair) > LONGEST for pair in subwords["train"])
    if long:
        print(f"warning: {long} train pairs have more than {LONGEST:,} subwords: training leaves them out", file=sys.stderr)
    folder = dest.with_name(f".{dest.name}.{os.getpid()}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for name in SPLITS:
            for side, lang in enumerate((pipeline.source_lang, pipeline.target_lang)):
                lines = (pair[side] for pair in subwords[name])
                write_atomic(folder / "text" / f"{name}.{lang}", "".join(f"{line}\n" for line in lines))
        references = "".join(f"{' '.join(target.split())}\n" for _, target in splits["test"])
        write_atomic(folder / "references.test", references)
        counts = {name: len(tokenized[name]) for name in SPLITS}
        pipeline.save(folder, pairs=counts, **facts)
        binarize(folder, pipeline, facts.get("padding_factor", USUAL_FACTOR))
        shutil.rmtree(folder / "text")
        (folder / "preprocess.log").unlink()
        folder.replace(dest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts


def made_files(pipeline: Pipeline) -> list[str]:
    """Names of the files that training and generation read."""
    pair = pipeline.source_lang, pipeline.target_lang
    binary = [f"{name}.{'-'.join(pair)}.{lang}.{kind}" for name in SPLITS for lang in pair for kind in ("bin", "idx")]
    return [CODES, *(f"dict.{lang}.txt" for lang in pair), *binary]


def read(args: argparse.Namespace) -> tuple[Splits, str]:
    """The splits that the flags name, and a SHA-256 of their content."""
    if args.corpus == "iwslt14":
        return corpora.iwslt14(args.data_dir, args.sha256)
    if args.corpus == "numbers":
        splits = corpora.numbers(args.seed, args.size)
    else:
        prefixes = {name: getattr(args, f"{name}_prefix") for name in SPLITS}
        splits = {name: corpora.read_pair(prefix, args.source_lang, args.target_lang) for name, prefix in prefixes.items()}
    return splits, hashlib.sha256(json.dumps(splits).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_prepare(argv)
    with clean_errors("transformer_iwslt/prepare.py"):
        engine.require()
        splits, sha256 = read(args)
        pipeline = Pipeline(args.source_lang, args.target_lang, not args.keep_case, codes="")
        facts = {"merges": args.bpe, "corpus": args.corpus or "files", "sha256": sha256}
        refuse_separator("--dest", args.dest)
        if args.dest.exists() and not (args.dest.is_dir() and not any(args.dest.iterdir())):
            held = read_json(args.dest / PREPARED) if (args.dest / PREPARED).exists() else {}
            held.setdefault("padding_factor", USUAL_FACTOR)
            facts["padding_factor"] = args.padding_factor or held["padding_factor"]
            if any(held.get(key) != value for key, value in (facts | pipeline.languages()).items()):
                raise ValueError(
                    f"{args.dest} exists but was prepared with other settings: choose another --dest, or remove it"
                )
            lacking = next((name for name in made_files(pipeline) if not (args.dest / name).is_file()), None)
            if lacking is not None:
                raise ValueError(f"{args.dest} lacks {lacking}: remove the folder, and prepare it again")
            print(f"{args.dest} is already prepared: nothing to do", file=sys.stderr)
            return
        engine.load()
        factor = args.padding_factor or 1
        facts |= {"padding_factor": factor} if factor != USUAL_FACTOR else {}
        counts = prepare(splits, pipeline, args.dest, facts, partial(place_in_file, args, splits))
    where = args.dest.relative_to(ROOT) if args.dest.is_relative_to(ROOT) else args.dest
    print(f"{where}: " + ", ".join(f"{count:,} {name} pairs" for name, count in counts.items()) + f" (SHA-256 {sha256})")


if __name__ == "__main__":
    exit_on_sigterm()
    main()
