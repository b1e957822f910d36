"""Sentence pairs: IWSLT'14 German-English, your own plain-text files, and embedded number words."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import shutil
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from common.experiments.downloads import downloading
from transformer_iwslt.text import split_lines

Pairs = list[tuple[str, str]]
Splits = dict[str, Pairs]  # "train", "valid" and "test"

IWSLT_URL = "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
IWSLT_BYTES = 19_982_877  # from a download log in fairseq issue 1493; we know of no published checksum
_IWSLT_TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
_SKIPPED = ("<url>", "<talkid>", "<keywords>")


def numbers(seed: int = 0, train: int = 20_000, held_out: int = 500) -> Splits:
    """German number words with their English translations: cardinals below a million, ordinals and years.

    No German side occurs twice. The numbers that are drawn depend on the seed alone.
    """
    from num2words import num2words

    generator = random.Random(seed)
    wanted = train + 2 * held_out
    candidates = [("cardinal", value) for value in range(2000)]
    candidates += [("ordinal", value) for value in range(1, 1000)]
    candidates += [("year", value) for value in range(1000, 2100)]
    large = max(0, wanted - len(candidates) + 1500)  # more than needed: some of these are equal in German
    candidates += [("cardinal", value) for value in generator.sample(range(2000, 1_000_000), large)]
    generator.shuffle(candidates)
    pairs: dict[str, str] = {}
    for kind, value in candidates:
        pairs.setdefault(num2words(value, lang="de", to=kind), num2words(value, lang="en", to=kind))
        if len(pairs) == wanted:
            break
    found = list(pairs.items())
    return {"valid": found[:held_out], "test": found[held_out : 2 * held_out], "train": found[2 * held_out :]}


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, plain or .gz. Raises ValueError naming the file and any line that is not UTF-8."""
    found = path if path.is_file() else path.with_name(path.name + ".gz")
    if not found.is_file():
        raise ValueError(f"there is no {path} and no {path.name}.gz beside it")
    try:
        content = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{found} is not a complete gzip file: {error}") from error
    lines = []
    for number, line in enumerate(split_lines(content), 1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{found}, line {number}, is not UTF-8: {error.reason} at byte {error.start}") from error
    return lines


def read_pair(prefix: Path, source_lang: str, target_lang: str) -> Pairs:
    """Pairs of PREFIX.source and PREFIX.target. Raises ValueError for empty or misaligned files, naming the first bad line."""
    if not prefix.name:
        raise ValueError(f"{prefix} names no files: give the PREFIX of PREFIX.{source_lang} and PREFIX.{target_lang}")
    names = [prefix.with_name(f"{prefix.name}.{lang}") for lang in (source_lang, target_lang)]
    source, target = (read_lines(name) for name in names)
    for name, lines in zip(names, (source, target), strict=True):
        if not lines:
            raise ValueError(f"{name} is empty")
    if len(source) != len(target):
        first = min(len(source), len(target)) + 1
        raise ValueError(
            f"{names[0]} has {len(source)} lines and {names[1]} has {len(target)}: line {first} is the first without a "
            "translation"
        )
    for number, (one, other) in enumerate(zip(source, target, strict=True), 1):
        if bool(one.strip()) != bool(other.strip()):
            empty = names[0] if not one.strip() else names[1]
            raise ValueError(f"{empty}, line {number}, is empty and its translation is not: the files are misaligned")
    pairs = [(one, other) for one, other in zip(source, target, strict=True) if one.strip()]
    if not pairs:
        raise ValueError(f"{names[0]} and {names[1]} have only empty lines")
    return pairs


def iwslt14(folder: Path, sha256: str | None = None) -> tuple[Splits, str]:
    """IWSLT'14 with the released code's splits, from de-en.tgz in ``folder``. The archive is downloaded if it is missing.

    The test set joins five development and test sets. ``valid`` is empty: prepare.py first tokenizes and cleans the training
    pairs, then takes every 23rd of them to validate on.

    Returns the splits and the archive's SHA-256. Raises ValueError if that differs from ``sha256`` or the archive is damaged,
    and OSError if it cannot be downloaded.
    """
    archive = folder / "de-en.tgz"
    if not archive.exists():
        _download(archive)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise ValueError(f"{archive} has SHA-256 {found}, expected {sha256}: delete it to download it again")
    try:
        with tarfile.open(archive) as packed:
            files = {Path(member.name).name: member for member in packed if member.isfile()}

            def pairs(name: str, read: Callable[[list[str]], Iterator[str]]) -> Pairs:
                sides = []
                for lang in ("de", "en"):
                    member = files.get(name.format(lang))
                    content = None if member is None else packed.extractfile(member)
                    if content is None:
                        raise ValueError(f"{archive} lacks {name.format(lang)}: it is not IWSLT'14 German-English")
                    sides.append(list(read([line.decode("utf-8") for line in split_lines(content.read())])))
                if len(sides[0]) != len(sides[1]):
                    raise ValueError(
                        f"{archive}: {name.format('de')} has {len(sides[0])} sentences, the English file {len(sides[1])}"
                    )
                return list(zip(*sides, strict=True))

            train = pairs("train.tags.de-en.{}", _talks)
            test = [pair for part in _IWSLT_TESTS for pair in pairs(f"IWSLT14.{part}.de-en.{{}}.xml", _segments)]
        with gzip.open(archive) as content:  # to its end, where the checksum is: tarfile stops before
            while content.read(1 << 20):
                pass
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{archive} is damaged ({error}): delete it to download it again") from error
    return {"train": train, "valid": [], "test": test}, found


def _talks(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not any(tag in line for tag in _SKIPPED):
            yield re.sub(r"</?(title|description)>", "", line).strip()


def _segments(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if "<seg id" in line:
            yield re.sub(r"\s*</?seg[^>]*>\s*", "", line).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def _download(archive: Path) -> None:
    partial = archive.with_name(f".{archive.name}.partial")
    by_hand = f"download {IWSLT_URL} to {archive}"
    other = "or prepare the embedded corpus with --corpus numbers, or your own files with --train-prefix"
    with downloading("IWSLT'14", by_hand, other):
        archive.parent.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(IWSLT_URL) as answer, open(partial, "wb") as file:
                size = int(answer.headers.get("Content-Length") or IWSLT_BYTES)
                with tqdm.wrapattr(answer, "read", total=size, desc="de-en.tgz", disable=not sys.stderr.isatty()) as stream:
                    shutil.copyfileobj(stream, file)
            if partial.stat().st_size != IWSLT_BYTES:
                raise OSError(f"got {partial.stat().st_size:,} bytes, expected {IWSLT_BYTES:,}")
            partial.replace(archive)
        finally:
            partial.unlink(missing_ok=True)
