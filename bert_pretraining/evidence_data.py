"""Make the files that the rows of evidence/ read, from clones of the repositories that publish the texts.

Every file is compared, by its SHA-256, with the one that the committed runs read. evidence/README.md has the commands.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside this program, whatever is installed

from bert_pretraining.text import SPLITS
from common.experiments.config import FlagParser, say_interrupted
from common.experiments.files import ROOT, read_json, write_atomic
from common.experiments.runs import clean_errors

PROG = "bert_pretraining/evidence_data.py"
BOOKS = Path(__file__).with_name("books.json")  # the books of each split, in order
# The clones, by flag: repository and commit.
CLONES = {
    "books": ("mlschmitt/classic-books-markdown", "944882722e9a96fa6cf2739dc2ea757e101f412f"),
    "sst2": ("clairett/pytorch-sentiment-classification", "457ffd83de90a9d6d472d8ffc31bbffe40a8b236"),
    "blimp": ("alexwarstadt/blimp", "3e56b06fcabca9b30822fc66435fca6b1aa40bb1"),
}
SHA256 = {
    "books.train.txt": "eb043b8138065666439315a91a36c77c46d13dd15dc1bb937d74088056214feb",
    "books.valid.txt": "dce25aed642ba16b559ff43ebd767ef8f9d113f488bf575cfa8538504d381a06",
    "books.test.txt": "e14b4c5892e315d74b7f6765dfa348042602c7c932201bbed044e86a89c84944",
    "sst2.train.tsv": "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920",
    "sst2.dev.tsv": "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359",
    "sst2.test.tsv": "831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7",
    "blimp.tsv": "4a290eec4c45abdfd35f6036a7f985adff751200de38d674d7a16c8c6fd7dc1c",
}
COMPRESSED = "9d34aaa0ed0acef8db6f690b51732cec56608b4be961a7607dccca2f978f27ba"  # SHA-256 of blimp.tsv.xz
_SHORTEST = 20  # characters of a paragraph that is kept


def paragraphs(markdown: str) -> list[str]:
    """The paragraphs of a book, each as one line, without headings, rules, short paragraphs and marks of emphasis."""
    found = []
    for block in re.split(r"\n\s*\n", markdown.replace("\r\n", "\n")):
        line = " ".join(block.split())
        if len(line) >= _SHORTEST and not line.startswith(("#", "---")):
            found.append(re.sub(r"[*_]{1,2}([^*_]+)[*_]{1,2}", r"\1", line))
    return found


def books(clone: Path) -> Iterator[tuple[str, bytes]]:
    """A text for each split: a paragraph a line, with an empty line after each book."""
    for split, names in read_json(BOOKS).items():
        lines = [line for name in names for line in [*paragraphs((clone / name).read_text("utf-8")), ""]]
        yield f"books.{split}.txt", "\n".join(lines).encode()


def sst2(clone: Path) -> Iterator[tuple[str, bytes]]:
    for split in SPLITS:
        name = split.replace("valid", "dev")
        yield f"sst2.{name}.tsv", (clone / "data" / "SST2" / f"{name}.tsv").read_bytes()


def blimp(clone: Path) -> Iterator[tuple[str, bytes]]:
    """All pairs as lines of field, term, paradigm, good and bad sentence, sorted by paradigm."""
    keys = ("field", "linguistics_term", "UID", "sentence_good", "sentence_bad")
    pairs = (json.loads(line) for path in sorted((clone / "data").glob("*.jsonl")) for line in path.open(encoding="utf-8"))
    lines = ("\t".join(pair[key] for key in keys) + "\n" for pair in pairs)
    yield "blimp.tsv", "".join(lines).encode()


MAKERS: dict[str, Callable[[Path], Iterator[tuple[str, bytes]]]] = {"books": books, "sst2": sst2, "blimp": blimp}


def main(argv: Sequence[str] | None = None) -> None:
    parser = FlagParser(prog=PROG, description="Make the files that the pre-training rows of evidence/ read.")
    for name, (repository, _) in CLONES.items():
        parser.add_argument(f"--{name}", type=Path, metavar="CLONE", help=f"clone of github.com/{repository}")
    parser.add_argument("--dest", type=Path, default=ROOT / "data", help="folder to write (default: data)")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in CLONES if getattr(args, name) is not None}
    if not given:
        parser.error("give at least one clone: --books, --sst2 or --blimp")
    with clean_errors(PROG):
        for name, clone in given.items():
            repository, commit = CLONES[name]
            remedy = f"clone https://github.com/{repository} and check out its commit {commit}"
            try:
                made = dict(MAKERS[name](clone))
            except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"--{name} {clone} cannot be read ({type(error).__name__}: {error}): {remedy}") from error
            for file, content in made.items():
                found = hashlib.sha256(content).hexdigest()
                if found != SHA256[file]:
                    raise ValueError(f"{file} from {clone} has SHA-256 {found}, expected {SHA256[file]}: {remedy}")
            for file, content in made.items():
                if name == "blimp":
                    file, content = f"{file}.xz", lzma.compress(content, preset=9)
                    if hashlib.sha256(content).hexdigest() != COMPRESSED:
                        print(
                            f"warning: this version of liblzma compresses {file} to other bytes than those of the committed "
                            "runs: collect cannot count new results of it together with those",
                            file=sys.stderr,
                        )
                write_atomic(args.dest / file, content)
                print(args.dest / file)


if __name__ == "__main__":
    say_interrupted(PROG)
    main()
