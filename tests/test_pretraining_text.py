"""Text for pre-training: reading and splitting files, tokenizers, character offsets, prepared folders."""

import collections
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_pretraining import corpora, prepare, text
from bert_pretraining.text import (
    BOS,
    BYTES,
    EOS,
    MASK,
    PAD,
    SPECIALS,
    SPLITS,
    UNK,
    Corpus,
    encode,
    encode_with_offsets,
    learn_tokenizer,
    load_tokenizer,
)
from common.experiments.files import ROOT, digest, read_json, write_json

NOUNS = "river house letter captain garden evening window mountain stranger silence question morning".split()
VERBS = "crossed remembered opened followed painted forgot measured answered repeated described".split()


def story(seed, lines=30):
    """Lines of made-up sentences."""
    draw = random.Random(seed).choice
    return "".join(f"The {draw(NOUNS)} {draw(VERBS)} the {draw(NOUNS)} {seed}. And so on…\n" for _ in range(lines))


@pytest.fixture
def books(tmp_path):
    """A folder of twelve stories, some of them compressed or in a subfolder, and of files that are not read."""
    folder = tmp_path / "books"
    (folder / "more" / ".hidden").mkdir(parents=True)
    for number in range(12):
        name, content = f"{'more/' * (number % 3 == 0)}story {number}", story(number).encode()
        match number % 4:
            case 0:
                (folder / f"{name}.txt").write_bytes(content)
            case 1:
                (folder / f"{name}.md").write_bytes(content)
            case 2:
                (folder / f"{name}.txt.gz").write_bytes(gzip.compress(content))
            case 3:
                (folder / f"{name}.xz").write_bytes(lzma.compress(content))
    for other in (".story.txt", "more/.hidden/story.txt", "cover.jpg"):
        (folder / other).write_bytes(b"\xff not read")
    return folder


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A prepared folder of the embedded corpus."""
    folder = tmp_path_factory.mktemp("data") / "numbers"
    prepare.main(f"--corpus numbers --lines 2000 --words 400 --dest {folder}".split())
    return folder


def learned(tmp_path_factory, **options):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    lines = [*story(0, 200).splitlines(), "fine café naïve Ünder — “quoted” 1234567890"] * 3
    path.write_bytes(learn_tokenizer(lines, 500, **options))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return learned(tmp_path_factory)


@pytest.fixture(scope="module")
def folding(tmp_path_factory):
    """A tokenizer that folds case."""
    return learned(tmp_path_factory, lower_case=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(corpus, split):
    """Text of each document of a split, from its tokens."""
    tokens = corpus.tokens(split).tolist()
    assert tokens[-1] == EOS
    documents, start = [], 0
    for index, token in enumerate(tokens):
        if token == EOS:
            documents.append(corpus.tokenizer.decode(tokens[start:index]))
            start = index + 1
    return documents


def plain(content):
    """Text as a tokenizer normalizes it, without line breaks and ligatures."""
    return " ".join(content.replace("…", "...").split())


# ---- prepared folders


def test_a_prepared_folder_holds_every_document_whole_and_once(books, tmp_path, capsys):
    prepare.main(f"--text {books} --words 400 --held-out 0.2 --dest {tmp_path / 'data'}".split())
    assert re.search(r"data: 400 words, [\d,]+ train tokens of \d documents, [\d,]+ valid tokens", capsys.readouterr().out)
    corpus = Corpus(tmp_path / "data")
    assert sorted(contents(tmp_path / "data")) == ["corpus.json", "test.bin", "tokenizer.model", "train.bin", "valid.bin"]
    found = {split: decoded(corpus, split) for split in SPLITS}
    everything = [document for split in SPLITS for document in found[split]]
    assert sorted(everything) == sorted(plain(story(number)) for number in range(12))
    assert all(found.values())
    held = corpus.facts["held_out"]
    for split in ("valid", "test"):
        seeds = [int(re.search(r"story (\d+)", name)[1]) for name in held[split]]
        assert found[split] == [plain(story(seed)) for seed in seeds]
    for split in SPLITS:
        tokens = corpus.tokens(split)
        assert (tokens.dtype, tokens.ndim, len(tokens)) == (np.uint16, 1, corpus.facts["tokens"][split])
        assert tokens[tokens < SPECIALS].tolist() == [EOS] * corpus.facts["documents"][split]
        assert tokens.max() < corpus.words == 400
        assert (tmp_path / "data" / f"{split}.bin").stat().st_size == 2 * len(tokens)


def test_special_tokens_have_the_ids_that_the_model_knows(numbers):
    tokenizer = Corpus(numbers).tokenizer
    assert (PAD, UNK, BOS, EOS, MASK, SPECIALS) == (0, 1, 2, 3, 4, 5)
    assert tokenizer.id_to_piece(list(range(6))) == ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "<0x00>"]
    assert [tokenizer.pad_id(), tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()] == [PAD, UNK, BOS, EOS]
    assert tokenizer.id_to_piece(SPECIALS + BYTES - 1) == "<0xFF>"
    assert min(encode(tokenizer, "<pad><unk><s></s><mask> ⁇ 漢\0")) >= SPECIALS  # text is never a special token


def test_the_digest_tells_tokenizers_apart(numbers, books, tmp_path):
    prepare.main(f"--text {books} --words 400 --dest {tmp_path / 'data'}".split())
    one, other = Corpus(numbers), Corpus(tmp_path / "data")
    assert one.digest == digest(numbers / "tokenizer.model") != other.digest
    assert re.fullmatch("[0-9a-f]{12}", one.digest)


def test_the_same_text_gives_the_same_bytes_whatever_the_threads(books, tmp_path):
    for name, threads in (("one", "1"), ("two", "4")):
        command = f"{ROOT / 'bert_pretraining' / 'prepare.py'} --text {books} --words 400 --dest {tmp_path / name}"
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run([sys.executable, *command.split()], env=environment, check=True, capture_output=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_of_long_text_a_fixed_part_of_the_lines_is_learned_from(books, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LEARNED", 5000)
    found = []

    def learn(lines, words, **options):
        found.append(list(lines))
        return learn_tokenizer(found[-1], words)

    monkeypatch.setattr(prepare, "learn_tokenizer", learn)
    for name in ("one", "two"):
        prepare.main(f"--text {books} --words 330 --dest {tmp_path / name}".split())
    assert found[0] == found[1]
    assert 4000 < sum(map(len, found[0])) < 6000
    assert len({re.search(r"\d+", line)[0] for line in found[0]}) == 10  # of each training file


def test_samples_are_even():
    assert list(prepare.sample(iter("abcdefghij"), 1.0)) == list("abcdefghij")
    assert list(prepare.sample(iter("abcdefghij"), 0.3)) == list("dgj")
    assert len(list(prepare.sample(iter("x" * 10_000), 0.123))) == 1230


@pytest.mark.parametrize("suffix", [".md", ".txt.gz", ".XZ"])
def test_a_file_reads_the_same_in_every_form(tmp_path, suffix):
    content = "Füße\r\nand a second line\r\n\r\nand more"
    plain_file, other = tmp_path / "a.txt", tmp_path / f"a{suffix}"
    plain_file.write_text(content.replace("\r\n", "\n"), newline="")
    marked = b"\xef\xbb\xbf" + content.encode()  # as Windows writes it
    other.write_bytes({".gz": gzip.compress, ".XZ": lzma.compress}.get(other.suffix, bytes)(marked))
    (one,), (two,) = (
        [corpora.Document(name, str(path), corpora.opener(path)) for name, path in corpora.find_files([path])]
        for path in (plain_file, other)
    )
    assert list(one.lines()) == list(two.lines()) == ["Füße\n", "and a second line\n", "\n", "and more"]
    assert one.check(lambda size: None)[1] == len(content) - 3


def test_long_lines_are_cut_at_spaces_and_encode_alike(tokenizer, monkeypatch):
    content = " ".join(story(seed, 3).replace("\n", " ") for seed in range(9)) + " " + "x" * 300 + "  end\nlast"
    monkeypatch.setattr(corpora, "LONGEST", 100)
    document = corpora.Document("a", "a", lambda: io.BytesIO(content.encode()))
    parts = list(document.lines())
    assert len(parts) > 10
    assert max(map(len, parts)) <= 200
    assert "".join(parts).replace(" ", "") == content.replace(" ", "")
    before = [token for part in parts if "x" not in part and "last" not in part for token in encode(tokenizer, part)]
    assert before == encode(tokenizer, content[: content.index("xx")])


def test_a_line_break_counts_as_a_space(tokenizer):
    lines = ["The river opened\n", "\n", "  the house.  \n", "And"]
    assert [token for line in lines for token in encode(tokenizer, line)] == encode(
        tokenizer, "The river opened the house. And"
    )
    assert encode(tokenizer, "".join(lines)) == encode(tokenizer, "The river opened the house. And")


def test_on_request_case_is_folded_in_the_tokenizer_itself(tokenizer, folding):
    assert encode(folding, "The RIVER Ünder") == encode(folding, "the river ünder")
    assert encode(tokenizer, "The RIVER") != encode(tokenizer, "the river")
    assert encode_with_offsets(folding, "The RIVER")[1][-1][1] == 9


def test_preparing_again_does_nothing_and_other_settings_are_refused(books, tmp_path, refuses, capsys):
    command = f"--text {books} --words 400 --dest {tmp_path / 'data'}"
    (tmp_path / "data").mkdir()  # an empty folder is accepted
    prepare.main(command.split())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    capsys.readouterr()
    prepare.main(command.split())
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", f"{tmp_path / 'data'} is already prepared: nothing to do\n")
    message = "exists but was prepared with other settings: choose another --dest, or remove it"
    refuses(prepare.main, command.replace("400", "401"), message)
    refuses(prepare.main, f"{command} --lower-case", message)
    refuses(prepare.main, f"{command} --held-out 0.3", message)
    refuses(prepare.main, command.replace("data", "books"), message)
    (books / "more" / "story 0.txt").write_text("Another story.")
    refuses(prepare.main, command, message)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == before


def test_a_damaged_folder_of_the_same_settings_is_not_taken_for_finished(numbers, tmp_path, refuses):
    shutil.copytree(numbers, tmp_path / "data")
    with open(tmp_path / "data" / "train.bin", "ab") as file:
        file.write(b"\0")
    message = f"prepare the text again; remove {tmp_path / 'data'} first"
    refuses(prepare.main, f"--corpus numbers --lines 2000 --words 400 --dest {tmp_path / 'data'}", message)


def test_a_link_to_a_folder_is_followed(books, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    prepare.main(f"--text {books} --words 400 --dest {tmp_path / 'data'}".split())
    assert (tmp_path / "data").is_symlink()
    assert Corpus(tmp_path / "disk").words == 400


def test_a_document_without_tokens_is_refused(books, tmp_path, refuses):
    (tmp_path / "controls.txt").write_bytes(b"\x01\n")
    command = f"--text {books} --test {tmp_path / 'controls.txt'} --words 400 --dest {tmp_path / 'data'}"
    refuses(prepare.main, command, "controls.txt has no tokens: all its characters are ignored")
    assert not (tmp_path / "data").exists()


def test_a_terminated_preparation_leaves_nothing(books, tmp_path):
    program = str(ROOT / "bert_pretraining" / "prepare.py")
    code = f"""
import runpy, signal, sys
from common.experiments import files
files.write_atomic = lambda *_: signal.raise_signal(signal.SIGTERM)  # it writes the tokenizer
sys.argv = [{program!r}, "--text", {str(books)!r}, "--words", "400", "--dest", {str(tmp_path / "data")!r}]
runpy.run_path({program!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert list(tmp_path.iterdir()) == [books]


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["lines", "write_tokens"])
def test_what_breaks_off_leaves_nothing(books, tmp_path, monkeypatch, error, step):
    original = corpora.Document.lines

    def fail(*args):
        yield from original(args[0])
        raise error

    def fail_at_once(*args):
        raise error

    if step == "lines":
        monkeypatch.setattr(corpora.Document, step, fail)  # inside sentencepiece
    else:
        monkeypatch.setattr(prepare, step, fail_at_once)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit if isinstance(error, OSError) else KeyboardInterrupt):
        prepare.main(f"--text {books} --words 400 --dest {tmp_path / 'data'}".split())
    assert sorted(tmp_path.iterdir()) == before


def test_preparing_loads_no_torch(tmp_path):
    code = """
import sys
from bert_pretraining import prepare
prepare.main(sys.argv[1:])
sys.exit(", ".join({"torch", "torchvision"} & set(sys.modules)) or 0)
"""
    words = f"--corpus numbers --lines 200 --words 330 --dest {tmp_path / 'data'}".split()
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")  # and no progress bar without a terminal


def test_without_sentencepiece_the_error_says_what_to_install(numbers, tmp_path, monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    refuses(prepare.main, f"--corpus numbers --dest {tmp_path / 'd'}", "not installed: install it with python -m pip install")
    with pytest.raises(ValueError, match=r"install it with python -m pip install .* '\.\[pretraining\]'"):
        Corpus(numbers)


# ---- splits


def documents(names):
    return [corpora.Document(name, name, io.BytesIO) for name in names]


def test_files_that_are_added_move_no_others():
    names = [f"book {number}.txt" for number in range(1000)]
    few, many = (corpora.hold_out({"train": documents(n), "valid": [], "test": []}, 0.05) for n in (names[:600], names))
    for split in SPLITS:
        before = {document.name for document in few[split]}
        assert before == {document.name for document in many[split]} & {*names[:600]}
    assert 30 < len(many["valid"]) < 70
    assert 30 < len(many["test"]) < 70
    assert sorted(document.name for split in SPLITS for document in many[split]) == sorted(names)


@pytest.mark.parametrize("count", [3, 4, 10])
@pytest.mark.parametrize("share", [0.001, 0.49])
def test_every_split_gets_a_file(count, share):
    for start in range(40):
        splits = corpora.hold_out({"train": documents(f"{start + i}" for i in range(count)), "valid": [], "test": []}, share)
        assert all(splits[split] for split in SPLITS)
        assert sum(map(len, splits.values())) == count


def test_named_files_stay_in_their_split(books, tmp_path):
    (tmp_path / "valid.txt").write_text("What is held out.")
    prepare.main(f"--text {books} --valid {tmp_path / 'valid.txt'} --words 400 --dest {tmp_path / 'data'}".split())
    corpus = Corpus(tmp_path / "data")
    assert corpus.facts["documents"] == {"train": 11, "valid": 1, "test": 1}
    assert decoded(corpus, "valid") == ["What is held out."]
    assert corpus.facts["held_out"]["valid"] == ["valid.txt"]


# ---- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give either --text or --corpus"),
        ("--text BOOKS --corpus numbers", "give either --text or --corpus"),
        ("--text BOOKS", "--text needs --dest"),
        ("--text BOOKS --dest d --seed 1", "--seed needs --corpus numbers, got --text"),
        ("--corpus numbers --valid BOOKS", "--valid needs --text, got --corpus numbers"),
        ("--corpus numbers --data-dir x", "--data-dir needs --corpus wikitext-103, got --corpus numbers"),
        ("--corpus numbers --lines 59", "--lines must be from 60"),
        ("--corpus wikitext-103 --held-out 0.1", "nothing to hold out"),
        ("--text BOOKS --dest d --held-out 0.5", "must be above 0 and below 0.5, got 0.5"),
        ("--text BOOKS --dest d --words 261", "must be above 261, the special tokens and all bytes"),
        ("--text BOOKS --dest d --words 65536", "at most 65535, got 65536"),
        ("--text BOOKS --dest d --words 263", "vocabulary of 263 is too small: the special tokens, the 256 bytes and the char"),
        ("--text BOOKS --dest d --words 60000", "a vocabulary of 60000 is too large for this text, which allows at most "),
        ("--text BOOKS/nothing.txt --dest d", "there is no file or folder BOOKS/nothing.txt"),
        ("--text BOOKS/cover.jpg --dest d", "cover.jpg does not end in one of .txt, .md, .gz, .xz"),
        ("--text BAD/nothing --dest d", "nothing has no text in it"),
        ("--text BAD/two --dest d", "has 2 files, but whole files are held out: give at least 3"),
        ("--text BOOKS BOOKS/more --dest d", "is given twice"),
        ("--text BOOKS --valid BOOKS/more --dest d", "is given twice"),
        ("--text BOOKS --valid BAD/two/one.txt --test BAD/link.txt --dest d", "is given twice"),
        ("--text BOOKS --valid BAD/same.txt --dest d", "story 2.txt.gz, in train: remove one"),
        ("--text BOOKS --valid BAD/empty.txt --dest d", "empty.txt is empty"),
        ("--text BOOKS --valid BAD/blank.txt.gz --dest d", "blank.txt.gz is empty"),
        ("--text BOOKS --valid BAD/latin.txt --dest d", "latin.txt is not UTF-8: invalid continuation byte at byte 2,000,003"),
        ("--text BOOKS --valid BAD/half.xz --dest d", "half.xz is not UTF-8: unexpected end of data at byte 1,048,575"),
        ("--text BOOKS --valid BAD/utf-16.txt --dest d", "utf-16.txt is not UTF-8: invalid start byte at byte 0"),
        ("--text BOOKS --valid BAD/tar.gz --dest d", "tar.gz is not plain text: byte 4 is zero"),
        ("--text BOOKS --valid BAD/short.gz --dest d", "short.gz is damaged: "),
        ("--text BOOKS --valid BAD/no.gz --dest d", "no.gz is damaged: "),
        ("--text BOOKS --valid BAD/short.xz --dest d", "short.xz is damaged: "),
        ("--text BOOKS --valid BAD/no.xz --dest d", "no.xz is damaged: "),
        ("--text BOOKS --valid BAD/changed.gz --dest d", "changed.gz is damaged: "),
        ("--text BOOKS --valid BAD/lfs.xz --dest d", "lfs.xz is a pointer of Git LFS"),
        ("--text BOOKS --dest BOOKS/cover.jpg", "cover.jpg exists but was prepared with other settings"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(books, tmp_path, monkeypatch, refuses, flags, message):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad"
    packed = gzip.compress(story(0).encode())
    for name, content in {
        "two/one.txt": b"One.",
        "two/two.txt": b"Two.",
        "same.txt": story(2).encode(),
        "empty.txt": b"",
        "blank.txt.gz": gzip.compress(b"\xef\xbb\xbf \n\n\t\n"),
        "latin.txt": b"a" * 2_000_003 + "é".encode("latin-1") + b"bc",
        "half.xz": lzma.compress(b"a" * (2**20 - 1) + "é".encode()[:1]),
        "utf-16.txt": "text".encode("utf-16"),
        "tar.gz": gzip.compress(b"name\0\0\0"),
        "short.gz": packed[:-20],
        "no.gz": b"plain text",
        "short.xz": lzma.compress(story(0).encode())[:-20],
        "no.xz": b"plain text",
        "changed.gz": packed[:-6] + b"\1\1" + packed[-4:],
        "lfs.xz": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    }.items():
        (bad / name).parent.mkdir(parents=True, exist_ok=True)
        (bad / name).write_bytes(content)
    (bad / "nothing").mkdir()
    (bad / "link.txt").symlink_to(bad / "two" / "one.txt")
    before = sorted(tmp_path.rglob("*"))
    command = flags.replace("BOOKS", str(books)).replace("BAD", str(bad))
    refuses(prepare.main, command, message.replace("BOOKS", str(books)))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_largest_vocabulary_that_the_error_names_is_possible(tmp_path):
    lines = story(0).splitlines()
    with pytest.raises(ValueError, match="at most") as error:
        learn_tokenizer(lines, 5000)
    most = int(re.search(r"at most (\d+)", str(error.value))[1])
    (tmp_path / "m").write_bytes(learn_tokenizer(lines, most))
    assert load_tokenizer(tmp_path / "m").vocab_size() == most
    with pytest.raises(ValueError, match=f"at most {most}"):
        learn_tokenizer(lines, most + 1)


def change(name):
    def changed(folder):
        path = folder / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return changed


def edit(**facts):
    return lambda folder: write_json(folder / "corpus.json", read_json(folder / "corpus.json") | facts)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"there is no folder .*: bert_pretraining/prepare.py --dest .* makes it from text"),
        (lambda folder: (folder / "corpus.json").unlink(), "has no corpus.json: it was not written by"),
        (lambda folder: (folder / "corpus.json").write_text("{"), "corpus.json is not a JSON file"),
        (lambda folder: (folder / "corpus.json").write_text("[]"), "corpus.json has format None, but this version reads 1"),
        (edit(format=2), "corpus.json has format 2, but this version reads 1: prepare the text again"),
        (edit(tokens={"train": 3}), "corpus.json has changed since it was written .'valid'.: prepare the text again"),
        (edit(words=401), "tokenizer.model has 400 words, expected 401"),
        (lambda folder: (folder / "test.bin").unlink(), "has no test.bin: prepare the text again"),
        (lambda folder: os.truncate(folder / "valid.bin", 100), "valid.bin has 100 bytes, expected [0-9,]+: prepare"),
        (change("train.bin"), "train.bin has changed since it was written: prepare the text again"),
        (change("tokenizer.model"), "tokenizer.model has changed since it was written: prepare the text again"),
    ],
)
def test_a_folder_that_is_not_as_it_was_written_is_refused(numbers, tmp_path, damage, message):
    shutil.copytree(numbers, tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        Corpus(tmp_path / "data")


def test_of_large_files_the_size_alone_is_checked(numbers, tmp_path, monkeypatch):
    shutil.copytree(numbers, tmp_path / "data")
    change("train.bin")(tmp_path / "data")
    monkeypatch.setattr(text, "_CHECKED", (numbers / "train.bin").stat().st_size - 1)
    Corpus(tmp_path / "data")
    os.truncate(tmp_path / "data" / "train.bin", 100)
    with pytest.raises(ValueError, match=r"train\.bin has 100 bytes"):
        Corpus(tmp_path / "data")


def test_other_tokenizers_are_refused(tmp_path):
    import sentencepiece

    with pytest.raises(ValueError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"tokenizer.model is not a sentencepiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")
    model = io.BytesIO()
    lines = iter(story(0).splitlines())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, vocab_size=50, minloglevel=2)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=r"has the tokens \['<unk>', '<s>', '</s>', .* expected \['<pad>', '<unk>'"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    for function in (encode, encode_with_offsets):
        with pytest.raises(ValueError, match="character 3 of the text is half of a surrogate pair"):
            function(tokenizer, "abc" + json.loads('"\\ud83d"'))


# ---- character offsets


def normalized(tokenizer, content):
    """Normalized text without spaces at its ends."""
    return tokenizer.normalize(content).replace("▁", " ").strip()


def check_offsets(tokenizer, content):
    """The characters of a group of tokens that share characters normalize to the text that these tokens decode to.

    Characters outside of all tokens normalize to nothing or to a space.
    """
    ids, offsets = encode_with_offsets(tokenizer, content)
    assert ids == encode(tokenizer, content)
    assert len(ids) == len(offsets)
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)
    assert all(0 <= start < end <= len(content) for start, end in offsets)
    groups = []
    for token, (start, end) in zip(ids, offsets, strict=True):
        if groups and start < groups[-1][2]:
            groups[-1][0].append(token)
            groups[-1][2] = max(groups[-1][2], end)
        else:
            groups.append([[token], start, end])
    position = 0
    for tokens, start, end in groups:
        assert tokenizer.decode(tokens).strip() == normalized(tokenizer, content[start:end])
        assert normalized(tokenizer, content[position:start]) == ""
        position = end
    assert normalized(tokenizer, content[position:]) == ""


def test_offsets_of_known_text(tokenizer):
    def spans(content):
        return [content[start:end] for start, end in encode_with_offsets(tokenizer, content)[1]]

    assert spans("The river") == ["The", "river"]
    assert spans("  The \t\n river ") == ["The", "river"]
    assert set(spans("漢")) == {"漢"}
    assert spans("字 river 漢")[-5:] == ["river", " ", *["漢"] * 3]
    half = encode_with_offsets(tokenizer, "The river½")[1]
    assert {(9, 10)} == {*half[2:]}
    assert len(half) >= 5  # a digit, a slash in three bytes, a digit
    assert spans("so on…")[-1] == "…"
    _, offsets = encode_with_offsets(tokenizer, "e\u0301🙂x")
    assert offsets[-1] == (3, 4)
    assert offsets.count((2, 3)) == 4  # bytes of the face
    assert encode_with_offsets(tokenizer, " \n") == ([], [])


STRANGE = (
    "The river … ½ ﬁne ﷺ 漢字 😀 👩‍👧 ß é e\u0301 İ ① ｶﾞ ガ 가 한국어 \u1112\u1161\u11ab \u200b \u200d \u00a0 \t \n \r\n "
    "\x01 \x7f \ufeff ▁ ▁▁ <mask> </s> <unk> ⁇ \u2028 \u0085 ㎏ ℃ ™ a\u0323\u0307 \u0344 ﬀi x² 10⁻³ ǅ "
    "\u017f \U0001f1e9\U0001f1ea ~ \uff5e \u3000"
).split(" ")


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.text(max_size=30),
        st.lists(st.sampled_from([*STRANGE, " ", "  ", "river", "a"]), max_size=12).map("".join),
        st.lists(st.sampled_from(STRANGE), max_size=12).map(" ".join),
    ).filter(lambda content: not re.search("[\ud800-\udfff]", content))
)
def test_offsets_are_exact_in_any_text(tokenizer, folding, content):
    check_offsets(tokenizer, content)
    check_offsets(folding, content)


def test_answers_in_real_questions(tmp_path):
    """For all answers of XQuAD from FNL_DATA: exactly the tokens that cover characters of an answer reproduce it."""
    source = Path(os.environ.get("FNL_DATA", "nowhere")) / "text" / "xquad.en.json"
    if not source.is_file():
        pytest.skip("FNL_DATA names no folder of real data with text/xquad.en.json")
    paragraphs = [part for article in json.loads(source.read_text())["data"] for part in article["paragraphs"]]
    (tmp_path / "tokenizer.model").write_bytes(learn_tokenizer([part["context"] for part in paragraphs], 2000))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    count = exact = 0
    for paragraph in paragraphs:
        context = paragraph["context"]
        check_offsets(tokenizer, context)
        _, offsets = encode_with_offsets(tokenizer, context)
        for answer in (answer for question in paragraph["qas"] for answer in question["answers"]):
            start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
            assert context[start:end] == answer["text"]
            inside = [span for span in offsets if span[0] < end and span[1] > start]
            found = context[inside[0][0] : inside[-1][1]]
            before, after = context[inside[0][0] : start], context[end : inside[-1][1]]
            assert found == before + answer["text"] + after
            assert not re.search(r"\s", before + after)  # a token holds more than the answer only inside a word
            count, exact = count + 1, exact + (re.sub(r"\W", "", found) == re.sub(r"\W", "", answer["text"]))
    assert count == 1190
    assert exact >= 0.99 * count  # except punctuation, which scores ignore: "1946," may be one token


# ---- embedded numbers


def test_numbers_in_words_are_those_of_num2words():
    num2words = pytest.importorskip("num2words").num2words
    for number in [*range(1200), 7000, 7005, 9999, 10_000, 99_100, 999_999]:
        expected = re.sub(r",| and\b", "", num2words(number)).replace("-", " ")
        assert corpora.in_words(number) == expected


def test_the_embedded_sentences_are_true():
    value = {corpora.in_words(number): number for number in range(12_000)}
    seen = collections.Counter()
    for documents in corpora.numbers(3, 4000, 0.02).values():
        for line in (line for document in documents for line in document.lines()):
            sentence = line.removesuffix(" .\n")
            if match := re.fullmatch("(.*) (plus|minus|times) (.*) is (.*)", sentence):
                one, other, result = (value[match[index]] for index in (1, 3, 4))
                assert result == {"plus": one + other, "minus": one - other, "times": one * other}[match[2]]
                seen[match[2]] += 1
            elif match := re.fullmatch("(.*) is less than (.*) , and (.*) is greater than (.*)", sentence):
                assert value[match[1]] < value[match[2]] == value[match[3]] > value[match[4]] == value[match[1]]
                seen["order"] += 1
            else:
                start, items = sentence.split(" : ")
                found = [value[item] for item in items.split(" , ")]
                assert len(found) == 6
                if start == "from small to large":
                    assert found == sorted({*found})
                else:
                    assert {*np.diff(found)} == {value[start.removeprefix("counting by ")]}
                seen[start.split()[0]] += 1
    assert len(seen) == 6
    assert min(seen.values()) > 300
    assert sum(seen.values()) == 4000


def test_numbers_depend_on_the_seed_alone(numbers, tmp_path):
    for seed in (0, 1):
        prepare.main(f"--corpus numbers --lines 2000 --words 400 --seed {seed} --dest {tmp_path / str(seed)}".split())
    assert contents(tmp_path / "0") == contents(numbers)
    assert contents(tmp_path / "1")["train.bin"] != contents(numbers)["train.bin"]


def test_defaults_of_the_flags():
    args = prepare.parse_prepare(["--corpus", "numbers"])
    assert (args.words, args.lines, args.seed, args.held_out) == (512, 30_000, 0, 0.02)
    assert args.dest == ROOT / "data-bin" / "pretraining-numbers"  # data-bin/numbers belongs to translation
    args = prepare.parse_prepare(["--corpus", "wikitext-103"])
    assert (args.words, args.data_dir, args.dest.name) == (8192, ROOT / "data" / "wikitext-103", "wikitext-103")


# ---- WikiText-103


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "served" / "wikitext-103-raw-v1.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for seed, split in enumerate(SPLITS):
            packed.writestr(f"wikitext-103-raw/wiki.{split}.raw", f" = Title = \n \n{story(seed)}")
    return path


@pytest.fixture
def server(archive, monkeypatch):
    """A server of the archive that refuses urllib, as the real one does. It leaves out the last ``short`` bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            if self.headers["User-Agent"].startswith("Python-urllib"):
                self.send_error(403)
                return
            content = archive.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) - self.server.short])

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as made:
        made.requests, made.short = [], 0
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.setattr(corpora, "WIKITEXT_URL", f"http://127.0.0.1:{made.server_port}/{archive.name}")
        yield made
        made.shutdown()


def test_wikitext_is_downloaded_once_and_split_as_it_is(server, archive, tmp_path, monkeypatch, capsys, refuses):
    command = f"--corpus wikitext-103 --words 350 --data-dir {tmp_path / 'raw'} --dest {tmp_path / 'data'}"
    prepare.main(command.split())
    output = capsys.readouterr()
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert f"(archive's SHA-256 {sha256})" in output.out
    assert f"has SHA-256 {sha256}; the known one is {corpora.WIKITEXT_SHA256}" in output.err
    corpus = Corpus(tmp_path / "data")
    assert corpus.facts["archive_sha256"] == sha256
    for seed, split in enumerate(SPLITS):
        assert decoded(corpus, split) == ["= Title = " + plain(story(seed))]
    assert [path.name for path in (tmp_path / "raw").iterdir()] == [archive.name]  # not unpacked
    prepare.main([*command.split(), "--sha256", sha256.upper()])
    assert capsys.readouterr().err.endswith("nothing to do\n")
    assert len(server.requests) == 1
    refuses(prepare.main, f"{command} --sha256 0{sha256[1:]}x", "expected 0")
    monkeypatch.setattr(corpora, "WIKITEXT_SHA256", sha256)
    prepare.main(command.split())
    assert "warning" not in capsys.readouterr().err


def test_a_download_that_breaks_off_leaves_nothing_and_says_what_to_do(server, tmp_path, refuses):
    server.short = 100
    command = f"--corpus wikitext-103 --data-dir {tmp_path / 'raw'} --dest {tmp_path / 'data'}"
    put = f"download {corpora.WIKITEXT_URL} with a browser to {tmp_path / 'raw' / 'wikitext-103-raw-v1.zip'}"
    refuses(prepare.main, command, put)
    assert list((tmp_path / "raw").iterdir()) == []
    server.shutdown()
    server.server_close()
    refuses(prepare.main, command, "or prepare the embedded corpus with --corpus numbers, or your own files with --text")


@pytest.mark.parametrize("damage", ["short", "changed", "other"])
def test_a_bad_archive_is_named(archive, tmp_path, monkeypatch, refuses, damage):
    message = {"short": "is damaged", "changed": "wiki.train.raw is damaged", "other": "lacks wiki.test.raw"}[damage]
    content = bytearray(archive.read_bytes())
    if damage == "short":
        archive.write_bytes(content[:-30])
    elif damage == "changed":
        content[200] ^= 1
        archive.write_bytes(content)
    else:
        with zipfile.ZipFile(archive, "w") as packed:
            for split in ("train", "valid"):
                packed.writestr(f"wiki.{split}.raw", "text")
    monkeypatch.setattr(corpora, "WIKITEXT_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    refuses(prepare.main, f"--corpus wikitext-103 --data-dir {archive.parent} --dest {tmp_path / 'data'}", message)
