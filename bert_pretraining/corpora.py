"""Training texts: your own files, WikiText-103, and embedded sentences about numbers. Loads without torch."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import lzma
import os
import random
import shutil
import sys
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from bert_pretraining.text import SPLITS
from common.experiments.downloads import downloading

WIKITEXT_URL = "https://wikitext.smerity.com/wikitext-103-raw-v1.zip"
# Of the archive at its old address, which no longer exists. Other projects, such as CorpusLoaders.jl, expect it.
WIKITEXT_SHA256 = "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"

LONGEST = 2**18  # characters; longer lines are cut at a space, so that memory stays bounded
_CHUNK = 2**20
_OPENERS: dict[str, Callable[..., Any]] = {".txt": open, ".md": open, ".gz": gzip.open, ".xz": lzma.open}
_DAMAGE = (gzip.BadGzipFile, lzma.LZMAError, zlib.error, zipfile.BadZipFile, EOFError)


@dataclass(frozen=True)
class Document:
    """A text. ``name`` identifies it, ``place`` names it in messages, and ``open`` opens its bytes."""

    name: str
    place: str
    open: Callable[[], IO[bytes]]

    def check(self, progress: Callable[[int], Any]) -> tuple[str, int]:
        """SHA-256 of the content, and its number of characters. ``progress`` is called with the number of bytes just read.

        Raises ValueError if the text is damaged, empty, not UTF-8, or holds a zero byte.
        """
        content, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
        offset = characters = 0
        blank = True
        try:
            with self.open() as stream:
                while True:
                    chunk = stream.read(_CHUNK)
                    text = decoder.decode(chunk, final=not chunk)
                    if b"\0" in chunk:
                        raise ValueError(f"{self.place} is not plain text: byte {offset + chunk.index(0):,} is zero")
                    content.update(chunk)
                    characters += len(text)
                    blank = blank and not text.strip("\ufeff").strip()
                    offset += len(chunk)
                    progress(len(chunk))
                    if not chunk:
                        break
        except UnicodeDecodeError as error:
            start = (
                offset + len(chunk) - len(error.object) + error.start
            )  # the decoder keeps the first bytes of an incomplete character
            raise ValueError(f"{self.place} is not UTF-8: {error.reason} at byte {start:,}") from error
        except _DAMAGE as error:
            raise ValueError(f"{self.place} is damaged: {error}") from error
        if blank:
            raise ValueError(f"{self.place} is empty")
        return content.hexdigest(), characters

    def lines(self) -> Iterator[str]:
        """Lines of the text; very long ones are split."""
        with self.open() as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
            rest = ""
            while part := rest + text.readline(LONGEST):
                rest = ""
                if len(part) >= LONGEST and not part.endswith("\n"):
                    head, _, tail = part.rpartition(" ")
                    part, rest = (head, tail) if head else (part, "")
                yield part


Splits = dict[str, list[Document]]  # "train", "valid" and "test"


def find_files(given: Sequence[Path]) -> list[tuple[str, Path]]:
    """Names and paths of the given text files, and of those at any depth of the given folders, sorted by name.

    The name of a file in a folder is relative to that folder. Hidden files and other suffixes are left out of folders.
    Raises ValueError if there is nothing to read.
    """
    found: list[tuple[str, Path]] = []
    for path in given:
        if path.is_dir():
            inside = [Path(inner, name) for inner, _, names in os.walk(path, followlinks=True) for name in names]
            texts = [file for file in inside if file.suffix.lower() in _OPENERS and file.is_file()]
            visible = [file for file in texts if "/." not in f"/{file.relative_to(path).as_posix()}"]
            if not visible:
                raise ValueError(f"{path} has no text in it: expected files that end in {', '.join(_OPENERS)}")
            found += [(file.relative_to(path).as_posix(), file) for file in visible]
        elif not path.exists():
            raise ValueError(f"there is no file or folder {path}")
        elif path.suffix.lower() not in _OPENERS:
            raise ValueError(f"{path} does not end in one of {', '.join(_OPENERS)}: give plain or compressed text")
        else:
            found.append((path.name, path))
    return sorted(found)


def opener(path: Path) -> Callable[[], IO[bytes]]:
    """A function that opens a text file for reading bytes, and decompresses it if its suffix says so."""
    return partial(_OPENERS[path.suffix.lower()], path, "rb")


def read_files(train: Sequence[Path], valid: Sequence[Path], test: Sequence[Path], share: float) -> Splits:
    """The splits of the given files and folders. If ``valid`` or ``test`` is empty, files of ``train`` are held out for it.

    Raises ValueError if a file is given twice, or is a pointer of Git LFS.
    """
    seen: set[Path] = set()
    splits: Splits = {}
    for split, given in zip(SPLITS, (train, valid, test), strict=True):
        splits[split] = []
        for name, path in find_files(given):
            if path.resolve() in seen:
                raise ValueError(f"{path} is given twice: name each file once, in one of --text, --valid and --test")
            seen.add(path.resolve())
            with open(path, "rb") as file:
                if file.read(64).startswith(b"version https://git-lfs"):
                    raise ValueError(f"{path} is a pointer of Git LFS, not the text: fetch the text with git lfs pull")
            splits[split].append(Document(name, str(path), opener(path)))
    return hold_out(splits, share)


def hold_out(splits: Splits, share: float) -> Splits:
    """Move about ``share`` of the training texts, at least one, to each empty split.

    A hash of each name decides which texts move. If the share is more than one text, texts that are added later do not move
    the others. Raises ValueError if there are too few texts.
    """

    def drawn(document: Document) -> float:
        return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8]) / 2**64

    missing = [split for split in ("test", "valid") if not splits[split]]
    if len(splits["train"]) <= len(missing):
        flags = " and ".join(f"--{split}" for split in reversed(missing))
        raise ValueError(
            f"--text has {len(splits['train'])} files, but whole files are held out: give at least {len(missing) + 1}, or name "
            f"the files to hold out with {flags}"
        )
    left = sorted(splits["train"], key=drawn)
    moved: Splits = {}
    for number, split in enumerate(missing, 1):
        below = sum(drawn(document) < number * share for document in left)
        count = max(1, min(below, len(left) - 1 - len(missing[number:])))  # every other split needs one
        moved[split], left = left[:count], left[count:]
    by_name = {split: sorted(documents, key=lambda document: document.name) for split, documents in moved.items()}
    return {**splits, **by_name, "train": sorted(left, key=lambda document: document.name)}


def wikitext(folder: Path, sha256: str | None = None) -> tuple[Splits, str]:
    """WikiText-103 with its own splits, from its archive in ``folder``. The archive is downloaded if it is missing.

    The archive is read without unpacking it. Returns the splits and the archive's SHA-256. Raises ValueError if that differs
    from ``sha256`` or the archive is damaged or incomplete, and OSError if it cannot be downloaded.
    """
    archive = folder / WIKITEXT_URL.rpartition("/")[2]
    if not archive.exists():
        _download(archive)
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise ValueError(f"{archive} has SHA-256 {found}, expected {sha256}: delete it to download it again")
    if sha256 is None and found != WIKITEXT_SHA256:
        print(f"warning: {archive} has SHA-256 {found}; the known one is {WIKITEXT_SHA256}", file=sys.stderr)
    try:
        with zipfile.ZipFile(archive) as packed:
            members = {Path(name).name: name for name in packed.namelist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is damaged ({error}): delete it to download it again") from error
    splits: Splits = {}
    for split in SPLITS:
        name = f"wiki.{split}.raw"
        if name not in members:
            raise ValueError(f"{archive} lacks {name}: it is not the raw text of WikiText-103")
        splits[split] = [Document(name, f"{archive}: {members[name]}", partial(_open_member, archive, members[name]))]
    return splits, found


def _open_member(archive: Path, name: str) -> IO[bytes]:
    return zipfile.ZipFile(archive).open(name)


def _download(archive: Path) -> None:
    partial_file = archive.with_name(f".{archive.name}.{os.getpid()}.partial")
    by_hand = f"download {WIKITEXT_URL} with a browser to {archive}"
    other = "or prepare the embedded corpus with --corpus numbers, or your own files with --text"
    request = urllib.request.Request(
        WIKITEXT_URL, headers={"User-Agent": "Mozilla/5.0"}
    )  # the server answers 403 to urllib's own
    with downloading("WikiText-103", by_hand, other):
        archive.parent.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(request) as answer, open(partial_file, "wb") as file:
                size = int(answer.headers.get("Content-Length") or 0)
                with tqdm.wrapattr(answer, "read", total=size, desc=archive.name, disable=not sys.stderr.isatty()) as stream:
                    shutil.copyfileobj(stream, file)
            if partial_file.stat().st_size < size:
                raise OSError(f"got {partial_file.stat().st_size:,} bytes of {size:,}")
            partial_file.replace(archive)
        finally:
            partial_file.unlink(missing_ok=True)


_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SENTENCES = 20  # lines in a document of numbers


def in_words(number: int) -> str:
    """A number from 0 to 999,999 in English words, without hyphens or "and"."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f" {_UNITS[number % 10]}" if number % 10 else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {in_words(number % size)}" if number % size else ""
    return f"{in_words(number // size)} {name}{rest}"


def _sentence(generator: random.Random, kind: str, most: int) -> str:
    """A true sentence of one kind about numbers below or not far above ``most``."""
    low, high = sorted(generator.sample(range(most), 2))
    step = generator.randrange(1, 11)
    numbers = {
        "sums": (low, high, low + high),
        "differences": (high, low, high - low),
        "products": (step, low, step * low),
        "order": (low, high),
        "counting": (step, *range(low, low + 6 * step, step)),
        "lists": tuple(sorted(generator.sample(range(most), 6))),
    }[kind]
    words = [in_words(number) for number in numbers]
    if kind == "order":
        return f"{words[0]} is less than {words[1]} , and {words[1]} is greater than {words[0]} ."
    if kind == "counting":
        return f"counting by {words[0]} : {' , '.join(words[1:])} ."
    if kind == "lists":
        return f"from small to large : {' , '.join(words)} ."
    operation = {"sums": "plus", "differences": "minus", "products": "times"}[kind]
    return f"{words[0]} {operation} {words[1]} is {words[2]} ."


def numbers(seed: int, lines: int, share: float) -> Splits:
    """Documents of 20 lines, each with true sentences of two kinds about numbers up to 20, 100 or 1000.

    They depend on the seed alone. They have structure to learn within a word or two and across a sentence, and serve only for
    trying things out.
    """
    generator = random.Random(seed)
    documents = []
    for start in range(0, lines, _SENTENCES):
        kinds = generator.sample(("sums", "differences", "products", "order", "counting", "lists"), 2)
        most = generator.choice((20, 100, 1000))
        count = min(_SENTENCES, lines - start)
        content = "".join(f"{_sentence(generator, generator.choice(kinds), most)}\n" for _ in range(count)).encode()
        name = f"numbers {start // _SENTENCES + 1}"
        documents.append(Document(name, name, partial(io.BytesIO, content)))
    return hold_out({"train": documents, "valid": [], "test": []}, share)
