"""The files that the pre-training rows of evidence/ read, from clones of the repositories that publish the texts."""

import hashlib
import json
import lzma

import pytest

from bert_pretraining import blimp, evidence_data
from bert_pretraining.evidence_data import SHA256, paragraphs
from common.experiments.files import ROOT, read_json

RESULTS = ROOT / "evidence" / "bert_pretraining"
BOOK = """# Title: The River

## Author: Nobody

-------
This paragraph follows the rule without a gap, so it is dropped.

## CHAPTER I\r
\r
_A line of verse_\r
_and another one_\r
\r
Too short a line.\r
\r
A *long* paragraph,\r
   of __two__ lines, with a [*] mark.\r
\r
\r
A letter where **nothing** ends_ as it began.
"""


def test_paragraphs_are_cleaned():
    assert paragraphs(BOOK) == [
        "A line of verse and another one",
        "A long paragraph, of two lines, with a [*] mark.",
        "A letter where nothing ends_ as it began.",
    ]


def test_committed_runs_read_these_files():
    used = {}
    for path in RESULTS.glob("evidence-pretraining-*/*/*/seed*/result.json"):
        inputs = read_json(path)["inputs"]
        named = {"train": "sst2.train.tsv", "dev": "sst2.dev.tsv", "test": "sst2.test.tsv", "data": "blimp.tsv.xz"}
        for name in {*inputs} & ({*named} if "init_from" in inputs else set()):
            used.setdefault(named[name], set()).add(inputs[name])
    expected = SHA256 | {"blimp.tsv.xz": evidence_data.COMPRESSED}
    assert {*used} == {"sst2.train.tsv", "sst2.dev.tsv", "sst2.test.tsv", "blimp.tsv.xz"}
    assert used == {name: {expected[name][:12]} for name in used}


def test_the_books_of_the_splits_differ():
    listed = read_json(evidence_data.BOOKS)
    names = [name for split in listed.values() for name in split]
    assert [*listed] == ["train", "valid", "test"]
    assert {split: len(books) for split, books in listed.items()} == {"train": 247, "valid": 6, "test": 5}
    assert len({*names}) == len(names)


@pytest.fixture
def clones(tmp_path, monkeypatch):
    """Small clones, and the command that reads them. SHA-256 and books are those of the clones."""
    books, sst2, pairs = (tmp_path / name for name in ("books", "sst2", "blimp"))
    for name in ("One/a", "One/b", "Two/c", "Two/d"):
        (books / name).parent.mkdir(parents=True, exist_ok=True)
        (books / f"{name}.md").write_text(BOOK.replace("letter", f"letter {name}"), newline="")
    listed = {"train": ["Two/d.md", "One/a.md"], "valid": ["One/b.md"], "test": ["Two/c.md"]}
    (tmp_path / "books.json").write_text(json.dumps(listed))
    (sst2 / "data" / "SST2").mkdir(parents=True)
    (pairs / "data").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (sst2 / "data" / "SST2" / f"{split}.tsv").write_text(f"a {split} film\t1\n")
    for paradigm in ("two", "one"):
        pair = {
            "field": "syntax",
            "linguistics_term": "order",
            "UID": paradigm,
            "sentence_good": "It is.",
            "sentence_bad": "Is it.",
        }
        (pairs / "data" / f"{paradigm}.jsonl").write_text(f"{json.dumps(pair)}\n" * 2)
    monkeypatch.setattr(evidence_data, "BOOKS", tmp_path / "books.json")
    made = [*evidence_data.books(books), *evidence_data.sst2(sst2), *evidence_data.blimp(pairs)]
    assert [name for name, _ in made] == [*SHA256]
    monkeypatch.setattr(evidence_data, "SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in made})
    return f"--books {books} --sst2 {sst2} --blimp {pairs} --dest {tmp_path / 'data'}"


def test_files_are_made_from_clones(clones, tmp_path, capsys):
    evidence_data.main(clones.split())
    made = {path.name: path for path in (tmp_path / "data").iterdir()}
    output = capsys.readouterr()
    assert {*output.out.split()} == {*map(str, made.values())}
    assert "collect cannot count new results" in output.err  # these pairs are not those of BLiMP
    assert {*made} == {*SHA256, "blimp.tsv.xz"} - {"blimp.tsv"}
    books = made["books.train.txt"].read_text().split("\n")
    assert books == [
        *paragraphs(BOOK.replace("letter", "letter Two/d")),
        "",
        *paragraphs(BOOK.replace("letter", "letter One/a")),
        "",
    ]
    assert made["sst2.dev.tsv"].read_text() == "a dev film\t1\n"
    assert lzma.decompress(made["blimp.tsv.xz"].read_bytes()).decode().startswith("syntax\torder\tone\tIt is.\tIs it.\n")
    assert blimp.read(made["blimp.tsv.xz"]) == blimp.read(tmp_path / "blimp" / "data")


def test_another_text_is_refused_and_nothing_is_written(clones, tmp_path, refuses):
    (tmp_path / "books" / "Two" / "c.md").write_text(BOOK + "\nA new paragraph of some length.\n")
    refuses(evidence_data.main, clones, "books.test.txt from ")
    assert not (tmp_path / "data").exists()
    (tmp_path / "books" / "Two" / "d.md").unlink()
    refuses(evidence_data.main, clones, "check out its commit 944882722e9a96fa6cf2739dc2ea757e101f412f")
    refuses(
        evidence_data.main,
        f"--blimp {tmp_path / 'books'} --dest {tmp_path / 'data'}",
        "clone https://github.com/alexwarstadt/blimp",
    )
    assert not (tmp_path / "data").exists()
    refuses(evidence_data.main, "--dest x", "give at least one clone: --books, --sst2 or --blimp")
