"""Fine-tuning a pre-trained encoder, and BLiMP: readers, windows and scores against brute force, and whole runs."""

import json
import lzma
import os
import random
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_pretraining import blimp, finetune, pretrained, squad
from bert_pretraining.blimp import Pair
from bert_pretraining.config import PretrainingConfig
from bert_pretraining.downstream import SCRIPTS, BlimpConfig, FinetuneConfig
from bert_pretraining.model import EncoderConfig, MaskedLanguageModel
from bert_pretraining.text import BOS, EOS, MASK, TOKENIZER, encode, encode_with_offsets, learn_tokenizer, load_tokenizer
from common.experiments import checkpoints, files
from common.experiments.files import digest, read_json
from common.experiments.results import RunResult
from common.tables.rows import Program, Row, Table

ANIMALS, PLACES = ["zebra", "lion", "otter", "heron"], ["river", "forest", "harbour", "meadow", "village"]
CONFIG = PretrainingConfig(data=Path("data-bin/books"), model="tiny")


def sentence(generator, subjects=ANIMALS):
    return f"The {generator.choice(subjects)} of the {generator.choice(PLACES)} saw a {generator.choice(PLACES)}."


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of train.py with a tiny random encoder."""
    folder = tmp_path_factory.mktemp("pretraining") / "run"
    folder.mkdir()
    generator = random.Random(0)
    (folder / TOKENIZER).write_bytes(learn_tokenizer([sentence(generator) for _ in range(200)], 330))
    torch.manual_seed(0)
    config = EncoderConfig(330, 32, 64, layers=2, heads=2, positions="alibi", max_positions=96, rank_scale=0.5)
    state = {
        "format": checkpoints.FORMAT,
        "model": MaskedLanguageModel(config).state_dict(),
        "architecture": asdict(config),
        "tokenizer": digest(folder / TOKENIZER),
        "config": CONFIG.record(),
        "step": CONFIG.steps,
        "seed": 0,
    }
    checkpoints.save(folder, state)
    return folder


@pytest.fixture(scope="module")
def tokenizer(run):
    return load_tokenizer(run / TOKENIZER)


# SQuAD


@pytest.mark.parametrize(
    ("prediction", "gold", "f1", "exact"),
    [
        ("The  Broncos!", "broncos", 1, 1),
        ("a U.S. team", "us team", 1, 1),
        ("Denver Broncos", "the Broncos", 2 / 3, 0),
        ("in 1990 and 1991", "1991", 2 / 5, 0),
        ("yes yes no", "yes no no", 2 / 3, 0),
        ("theatre", "the atre", 0, 0),
        ("Panthers", "Broncos", 0, 0),
        ("", "Broncos", 0, 0),
    ],
)
def test_answers_are_scored_by_the_official_definition(prediction, gold, f1, exact):
    assert squad.f1(prediction, gold) == pytest.approx(f1)
    assert squad.exact(prediction, gold) == exact


def test_of_several_answers_the_best_counts_and_no_prediction_is_wrong():
    question = squad.Question("1", "who?", "the red fox and a hare", ((4, "red fox"), (18, "hare")))
    other = squad.Question("2", "who?", "the red fox", ((8, "fox"),))
    assert squad.scores([question], {"1": "hare"}) == {"f1": 100, "exact": 100}
    assert squad.scores([question, other], {"1": "fox"}) == {"f1": pytest.approx(100 / 3), "exact": 0}


def squad_file(path, questions):
    """A SQuAD 1.1 file of questions (id, question, context, answer). An answer is at its first occurrence in the context."""
    entries = [
        {
            "context": context,
            "qas": [{"id": id, "question": text, "answers": [{"answer_start": context.index(answer), "text": answer}]}],
        }
        for id, text, context, answer in questions
    ]
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": entries}]}))
    return path


def make_questions(count, seed=0, length=3):
    """Questions about the only animal in a text."""
    generator = random.Random(seed)
    for index in range(count):
        sentences = [sentence(generator, PLACES) for _ in range(length)]
        place = generator.randrange(length)
        sentences[place] = sentence(generator)
        yield f"q{index}", "Which animal is it?", " ".join(sentences), sentences[place].split()[1]


def test_windows_hold_every_token_and_lead_back_to_the_answers(tmp_path, tokenizer):
    questions = squad.read(squad_file(tmp_path / "train.json", make_questions(20, length=12)))
    found = squad.windows(questions, lambda text: encode_with_offsets(tokenizer, text), max_tokens=40, stride=11)
    for index, question in enumerate(questions):
        ids, offsets = encode_with_offsets(tokenizer, question.context)
        asked = encode(tokenizer, question.text)
        own = [window for window in found if window.question == index]
        assert len(own) > 2
        for place, window in enumerate(own):
            part = ids[place * 11 : place * 11 + 40 - len(asked) - 3]
            assert window.tokens.tolist() == [BOS, *asked, EOS, *part, EOS]
            assert window.offsets.tolist() == [list(each) for each in offsets[place * 11 : place * 11 + len(part)]]
            if window.target != (0, 0):
                first, last = (position - window.first for position in window.target)
                assert squad.answer(question, window.offsets, first, last) == question.answers[0][1]
        covered = {token for place, window in enumerate(own) for token in range(place * 11, place * 11 + len(window.offsets))}
        assert covered == set(range(len(ids)))
        assert any(window.target != (0, 0) for window in own)
    short = squad.windows(questions[:1], lambda text: encode_with_offsets(tokenizer, text), max_tokens=1000, stride=999)
    assert len(short) == 1


def test_a_long_question_is_cut():
    questions = [squad.Question("1", "x" * 100, "y" * 50, ((0, "y"),))]
    (window,) = squad.windows(
        questions, lambda text: (list(range(9, 9 + len(text))), [(i, i + 1) for i in range(len(text))]), 200, 9
    )
    assert len(window.tokens) == 64 + 50 + 3


def test_the_best_span_is_that_of_all_pairs():
    torch.manual_seed(0)
    far = torch.zeros(60, 2)  # the ends that suit the first token best are at and beyond the longest answer
    far[0, 0], far[29, 1], far[30, 1] = 9, 1, 2
    for scores in (*(torch.randn(length, 2) for length in (1, 7, 60)), far):
        length = len(scores)
        spans = {(i, j): scores[i, 0] + scores[j, 1] for i in range(length) for j in range(i, min(i + squad.ANSWER, length))}
        best = max(spans, key=lambda span: spans[span])
        assert finetune.best_span(scores) == (spans[best].item(), *best)


def test_answers_of_real_questions_lead_back_to_themselves(tmp_path):
    """A token may hold a character next to an answer, such as the comma of "1990,", which the scores ignore."""
    source = os.environ.get("FNL_DATA")
    if source is None:
        pytest.skip("FNL_DATA names no folder of real data")
    path = Path(source) / "text" / "xquad.en.json"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    questions = squad.read(path)
    contexts = list(dict.fromkeys(question.context for question in questions))
    (tmp_path / TOKENIZER).write_bytes(learn_tokenizer(contexts, 4000))
    tokenizer = load_tokenizer(tmp_path / TOKENIZER)
    offsets = {context: np.array(encode_with_offsets(tokenizer, context)[1]) for context in contexts}
    same = 0
    for question in questions:
        start, text = question.answers[0]
        found = squad.answer(
            question, offsets[question.context], *squad.token_span(offsets[question.context], start, start + len(text))
        )
        assert text in found
        same += squad.exact(found, text)
    assert len(questions) == 1190
    assert same >= 1189  # one token holds "s" of "1990s" or the like


SQUAD_ERRORS = {
    "has the answer 'fox' at character 3, where the context has ' re'": {"answers": [{"answer_start": 3, "text": "fox"}]},
    "has the answer 'fox' at character -3, where the context has ''": {"answers": [{"answer_start": -3, "text": "fox"}]},
    "question q7 has no answer": {"answers": []},
    "is not in the format of SQuAD 1.1: KeyError 'answers'": {},
    "is not in the format of SQuAD 1.1: TypeError": {"answers": [{"answer_start": "8", "text": "fox"}]},
    "TypeError question q7 has 7 where a text is expected": {"question": 7, "answers": [{"answer_start": 8, "text": "fox"}]},
    "question q7: character 3 of the text is half of a surrogate pair": {
        "question": "who\ud800",
        "answers": [{"answer_start": 8, "text": "fox"}],
    },
}


def test_a_context_without_tokens_is_refused():
    question = squad.Question("q7", "who?", "\u200b", ((0, "\u200b"),))
    with pytest.raises(ValueError, match="question q7 has a context without tokens"):
        squad.windows([question], lambda text: ([], []) if text == "\u200b" else ([9], [(0, 1)]), 32, 8)


@pytest.mark.parametrize("message", SQUAD_ERRORS)
def test_bad_questions_are_refused_by_id(message, tmp_path):
    entry = {"context": "the red fox", "qas": [{"id": "q7", "question": "who?", **SQUAD_ERRORS[message]}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [entry]}]}))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
        squad.read(path)


# BLiMP


@pytest.mark.parametrize("end", [False, True])
def test_pseudo_log_likelihoods_are_those_of_single_masks(run, end):
    """In float64, one sentence and one position at a time. Batches of several lengths give the same values."""
    model, tokenizer = pretrained.load(run / "checkpoint.pt")
    model.double()
    generator = random.Random(1)
    sentences = [tuple(encode(tokenizer, sentence(generator))) for _ in range(6)] + [(7,), (9, 8)]
    found = blimp.log_likelihoods(model, sentences, batch_size=16, end=end)
    for tokens in sentences:
        total = 0.0
        for place, token in enumerate(tokens):
            masked = [BOS, *tokens[:place], MASK, *tokens[place + 1 :]] + ([EOS] if end else [])
            with torch.no_grad():
                scores = model.score(model.encode(torch.tensor([masked]))[0, place + 1])
            total += scores.log_softmax(0)[token].item()
        assert found[tokens] == pytest.approx(total, rel=1e-12)


PAIRS = [
    Pair("agreement", "The zebra of the river saw a forest.", "The zebra of the river saw forest a."),
    Pair("order", "The otter saw a lion.", "Otter the saw a lion."),
    Pair("agreement", "The lion of the meadow saw a river.", "The lion of meadow the saw a river."),
]


def write_jsonl(folder):
    folder.mkdir()
    for paradigm in ("order", "agreement"):
        lines = [
            json.dumps({"sentence_good": pair.good, "sentence_bad": pair.bad, "UID": pair.paradigm, "field": "syntax"}) + "\n"
            for pair in PAIRS
            if pair.paradigm == paradigm
        ]
        (folder / f"{paradigm}.jsonl").write_text("".join(lines))
    return folder


def write_tsv(path, pairs=PAIRS):
    with lzma.open(path, "wt") as file:
        file.writelines(f"syntax\tterm\t{pair.paradigm}\t{pair.good}\t{pair.bad}\n" for pair in pairs)
    return path


def test_blimp_is_read_from_its_own_files_and_from_one(tmp_path):
    folder, packed = write_jsonl(tmp_path / "data"), write_tsv(tmp_path / "blimp.tsv.xz")
    assert blimp.read(packed) == PAIRS
    assert sorted(blimp.read(folder), key=PAIRS.index) == PAIRS
    assert blimp.read(packed, first=1) == PAIRS[:2]
    assert blimp.read(folder / "order.jsonl") == PAIRS[1:2]


def test_real_blimp_has_67_paradigms_of_1000_pairs():
    path = Path(os.environ.get("FNL_DATA", "")) / "text" / "blimp.tsv.xz"
    if "FNL_DATA" not in os.environ or not path.exists():
        pytest.skip("FNL_DATA names no folder of real data with text/blimp.tsv.xz")
    pairs = blimp.read(path)
    assert len(pairs) == 67_000
    assert len({pair.paradigm for pair in pairs}) == 67
    assert len(blimp.read(path, first=3)) == 67 * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "a\tb\tc\tone\ttwo\na\tb\n", "line 2 is not a pair of sentences: ValueError expected 5 columns"),
        ("x.tsv", "a\tb\tc\tone\t\n", "line 1 is not a pair of sentences: ValueError paradigm and sentences must be text"),
        ("x.jsonl", '{"UID": "a", "sentence_good": "b"}\n', "line 1 is not a pair of sentences: KeyError 'sentence_bad'"),
        (
            "x.jsonl",
            '{"UID": "a", "sentence_good": "b\\ud800", "sentence_bad": "c"}\n',
            "line 1 is not a pair of sentences: ValueError ",
        ),
        ("x.jsonl", "not json\n", "line 1 is not a pair of sentences: JSONDecodeError"),
        ("x.jsonl", "", "has no pairs"),
        ("x.txt", "", "must be a .jsonl, .tsv or .tsv.xz file"),
        ("x.tsv.xz", "not compressed", "cannot be read"),
    ],
)
def test_bad_pairs_are_refused_by_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))}.*{re.escape(message)}"):
        blimp.read(tmp_path / name)


def test_blimp_scores_all_pairs_and_each_paradigm_and_ties_are_wrong(run, tmp_path, capsys):
    tie = Pair("tie", "The zebra saw a lion.", "The  zebra saw a lion.")  # the same tokens: spaces are joined
    data = write_tsv(tmp_path / "blimp.tsv.xz", [*PAIRS, tie, tie])
    command = ["--init-from", str(run), "--data", str(data), "--save-dir", str(tmp_path / "scored"), "--device", "cpu"]
    command += ["--pretraining", CONFIG.config_hash(), "--row", "t/r", "--row-config", "0"]
    blimp.main(command)
    path = Path(capsys.readouterr().out.strip())
    result = RunResult.load(path)
    result.check({("bert_pretraining", script): kind for script, kind in SCRIPTS.items()})
    model, tokenizer = pretrained.load(run / "checkpoint.pt")
    likelihoods = [
        [
            blimp.log_likelihoods(model, [tokens], 999)[tokens]
            for tokens in (tuple(encode(tokenizer, pair.good)), tuple(encode(tokenizer, pair.bad)))
        ]
        for pair in PAIRS
    ]
    right = [good > bad for good, bad in likelihoods]
    assert result.metrics["paradigms"] == {"agreement": 50 * (right[0] + right[2]), "order": 100 * right[1], "tie": 0}
    assert result.final == result.best == 20 * sum(right)
    assert result.metrics["pairs"] == 5
    assert result.row is None  # its configuration differs from the row's
    assert result.parameters["ratio"] < 1
    assert set(result.inputs) == {"init_from", "data"}
    blimp.main([*command, "--resume", "auto"])
    output = capsys.readouterr()
    assert Path(output.out.strip()) == path
    assert "nothing to do" in output.err


def test_a_sentence_without_tokens_is_refused(run, tmp_path, refuses):
    data = tmp_path / "x.tsv"
    data.write_text("syntax\tterm\torder\t\u200b\tThe lion saw a zebra.\n")
    refuses(blimp.main, f"--init-from {run} --data {data} --save-dir {tmp_path / 'made'} --device cpu", "has no tokens")
    assert not (tmp_path / "made").exists()


def test_of_several_processes_the_first_alone_scores(run, tmp_path, capsys, monkeypatch):
    data = write_tsv(tmp_path / "blimp.tsv.xz")
    command = ["--init-from", str(run), "--data", str(data), "--save-dir", str(tmp_path / "scored"), "--device", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    blimp.main(command)
    assert not (tmp_path / "scored").exists()
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    blimp.main(command)
    output = capsys.readouterr()
    assert Path(output.out.strip()) == tmp_path / "scored" / "result.json"
    assert "blimp.py runs in one process" in output.err


def test_the_files_of_a_folder_are_inputs_of_their_own(run, tmp_path):
    config = BlimpConfig(init_from=run, data=write_jsonl(tmp_path / "data"))
    assert set(config.inputs()) == {"init_from", "data/agreement.jsonl", "data/order.jsonl"}
    assert config.init_from == run / "checkpoint.pt"


# Fine-tuning


def write_sentences(path, count, seed, header=""):
    """Sentences labeled with the animal that they are about."""
    generator = random.Random(seed)
    lines = [sentence(generator) for _ in range(count)]
    path.write_text(header + "".join(f"{line}\t{line.split()[1]}\n" for line in lines))
    return path


@pytest.fixture
def sentences(run, tmp_path):
    """The command of a run that learns to classify sentences."""
    train, dev = (
        write_sentences(tmp_path / "train.tsv", 200, 0, "Sentence\tLabel\n"),
        write_sentences(tmp_path / "dev.tsv", 40, 1),
    )
    words = f"--init-from {run} --task sentences --train {train} --dev {dev} --max-tokens 32 --epochs 4 --lr 3e-3 --seed 5"
    return [*words.split(), "--device", "cpu"]


def read_result(capsys):
    return RunResult.load(Path(capsys.readouterr().out.strip()))


def test_fine_tuning_learns_to_classify_and_is_the_same_again(sentences, tmp_path, capsys):
    test = write_sentences(tmp_path / "test.tsv", 60, 2)
    finetune.main([*sentences, "--test", str(test), "--save-dir", str(tmp_path / "one")])
    result = read_result(capsys)
    assert result.final == 100
    assert result.best >= 90
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["test_accuracy"] == result.final
    best = max(range(4), key=lambda index: lines[index]["dev_accuracy"])
    assert result.metrics["best_epoch"] == best + 1
    assert result.best == lines[best]["test_accuracy"]
    assert lines[0]["loss"] > lines[-1]["loss"]
    assert set(result.inputs) == {"init_from", "train", "dev", "test"}
    assert result.decays == [
        {"group": "weights", "tensors": 14, "weight_decay": 0.01},
        {"group": "norms and biases", "tensors": 6, "weight_decay": 0.0},
    ]

    left = tmp_path / "two"  # left by a run that was killed
    finetune.main([*sentences, "--test", str(test), "--save-dir", str(left)])
    (left / "result.json").unlink()
    finetune.main([*sentences, "--test", str(test), "--save-dir", str(left), "--resume", "auto"])
    assert (left / "metrics.jsonl").read_text() == (tmp_path / "one" / "metrics.jsonl").read_text()
    capsys.readouterr()
    finetune.main([*sentences, "--test", str(test), "--save-dir", str(left), "--resume", "auto"])
    assert "nothing to do" in capsys.readouterr().err
    finetune.main([*sentences, "--test", str(test), "--save-dir", str(tmp_path / "three"), "--seed", "6"])
    assert (tmp_path / "three" / "metrics.jsonl").read_text() != (tmp_path / "one" / "metrics.jsonl").read_text()


def test_fine_tuning_learns_to_answer(run, tmp_path, capsys):
    train, dev = (
        squad_file(tmp_path / "train.json", make_questions(300)),
        squad_file(tmp_path / "dev.json", make_questions(40, 1)),
    )
    words = f"--init-from {run} --task squad --train {train} --dev {dev} --epochs 4 --lr 3e-3 --device cpu --max-tokens 96"
    finetune.main([*words.split(), "--stride", "9", "--batch-size", "16", "--save-dir", str(tmp_path / "run")])
    result = read_result(capsys)
    assert result.final >= 95
    assert 90 <= result.metrics["final_exact"] <= result.final
    assert result.best == max(
        json.loads(line)["dev_f1"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )


def make_task(kind, tokenizer, tmp_path, **options):
    train = squad_file(tmp_path / "train.json", make_questions(3, length=12))
    return kind(FinetuneConfig(init_from=Path("x"), task="squad", train=train, dev=train, **options), tokenizer)


def test_an_answer_is_the_best_of_all_windows(tokenizer, tmp_path):
    """The outputs point at the answer, most strongly in the window that has it. The order of windows does not matter."""
    task = make_task(finetune.Questions, tokenizer, tmp_path, max_tokens=96, stride=20)

    def predict(windows):
        for window in windows:
            outputs = torch.zeros(len(window.tokens), 2)
            outputs[window.first, 0] = outputs[window.first + 1, 1] = 1.0  # in every window
            outputs[0] = 99.0  # BOS, which is not an answer
            for kind, position in enumerate(window.target if window.target != (0, 0) else ()):
                outputs[position, kind] = 2.0
            yield window, outputs

    assert any(window.target == (0, 0) for window in task.train)
    assert task.evaluate("dev", predict) == {"f1": 100, "exact": 100}
    assert task.evaluate("dev", lambda windows: predict(windows[::-1])) == {"f1": 100, "exact": 100}


def test_losses_and_outputs_do_not_depend_on_padding(run, tokenizer, tmp_path):
    task = make_task(finetune.Questions, tokenizer, tmp_path, max_tokens=96, stride=20)
    encoder, _ = pretrained.load(run / "checkpoint.pt")
    network = finetune.Network(encoder, 2, 0.0).double().eval()
    windows = sorted(task.train, key=lambda window: len(window.tokens))[:: len(task.train) // 3]
    assert len({len(window.tokens) for window in windows}) > 1
    tokens, words = pretrained.pad([window.tokens for window in windows], torch.device("cpu"))
    outputs = network(tokens, words)
    losses = []
    for window, row in zip(windows, outputs, strict=True):
        alone = network(
            torch.from_numpy(window.tokens.astype(np.int64))[None], torch.ones(1, len(window.tokens), dtype=torch.bool)
        )
        torch.testing.assert_close(row[: len(window.tokens)], alone[0], rtol=1e-12, atol=1e-12)
        begin, end = alone[0].log_softmax(0).T
        losses.append(-(begin[window.target[0]] + end[window.target[1]]) / 2)
    loss = task.loss(outputs, words, torch.tensor([window.target for window in windows]))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-12, atol=1e-12)


def test_the_best_epoch_is_chosen_on_dev_and_measured_on_test(sentences, tmp_path, capsys, monkeypatch):
    scores = {"dev": iter([50.0, 70.0, 70.0, 60.0]), "test": iter([51.0, 71.0, 99.0, 61.0])}
    monkeypatch.setattr(finetune.Sentences, "evaluate", lambda self, split, predict: {"accuracy": next(scores[split])})
    test = write_sentences(tmp_path / "test.tsv", 9, 2)
    finetune.main([*sentences, "--test", str(test), "--save-dir", str(tmp_path / "run")])
    assert read_result(capsys).metrics == {"final": 61, "best": 71, "best_epoch": 2}


def test_rows_may_follow_a_row_of_pre_training():
    before = Row("mini", "", ("data-bin/books", "--model", "mini"))
    start = ("--init-from", "{after}", "--pretraining", PretrainingConfig.parse(before.flags).config_hash())
    rows = [
        Row("mini-blimp", "", (*start, "--data", "blimp.tsv.xz"), script="blimp.py", after=before),
        Row("mini-sst2", "", (*start, "--task", "sentences", "--train", "a", "--dev", "b"), script="finetune.py", after=before),
    ]
    program = Program("bert_pretraining", SCRIPTS, (Table("t", "", (before, *rows)),))
    hashes = {program.config_hash(row) for row in (before, *rows)}
    assert len(hashes) == 3
    other = Row("other", "", (*start[:3], "0" * 12, *rows[1].flags[4:]), script="finetune.py")
    assert program.config_hash(other) not in hashes


def test_rows_find_their_data_in_the_project_from_any_folder(tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    monkeypatch.setattr(files, "ROOT", project)
    names = ("data-bin/books/corpus.json", "data/train", "data/dev", "data/test", "data/blimp.tsv")
    for name in names:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text('{"digests": {"train.bin": "0123"}}')
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def found():
        pretraining = PretrainingConfig.parse(["data-bin/books"])
        words = "--init-from run --task sentences --train data/train --dev data/dev --test data/test"
        tuned = FinetuneConfig.parse(words.split())
        scored = BlimpConfig.parse(["--init-from", "run", "--data", "data/blimp.tsv"])
        return pretraining, [pretraining.data / "corpus.json", tuned.train, tuned.dev, tuned.test, scored.data]

    pretraining, paths = found()
    assert paths == [project / name for name in names]
    assert pretraining.inputs() == {"train": "0123"}
    shutil.copytree(project, elsewhere, dirs_exist_ok=True)
    assert found()[1] == [Path(name) for name in names]  # those of the current folder come first


def test_scores_with_and_without_an_end_are_not_mixed(run, tmp_path, capsys, refuses):
    command = f"--init-from {run} --data {write_tsv(tmp_path / 'blimp.tsv.xz')} --save-dir {tmp_path / 'scored'} --device cpu"
    blimp.main(command.split())
    refuses(blimp.main, f"{command} --end-token --resume auto", "another configuration (end_token False there, True here)")


ERRORS = {
    "": "the following arguments are required: --init-from",
    "--init-from nowhere": "there is no checkpoint at nowhere",
    "--init-from {run} --pretraining 0123456789ab": f"{CONFIG.config_hash()}, but --pretraining requires 0123456789ab",
    f"--init-from {{unfinished}} --pretraining {CONFIG.config_hash()}": "is at step 7 of 10000, but --pretraining requires a",
    "--init-from {foreign}": "is not a checkpoint of bert_pretraining/train.py: it has no 'architecture'",
    "--init-from {bare}": "there is no tokenizer.model beside",
    "--init-from {swapped}": "but {swapped}/checkpoint.pt was trained with",
    "--init-from {run} --max-tokens 97": "--max-tokens 97 exceeds the 96 positions of the encoder: lower it",
    "--init-from {run} --max-tokens 2": "--max-tokens must be at least 3, got 2",
    "--init-from {run} --stride 9": "--stride 9 needs --task squad",
    "--init-from {run} --warmup 1": "--warmup: must be in [0, 1), got 1",
    "--init-from {run} --dropout 2": "--dropout: must be in [0, 1), got 2",
    "--init-from {run} --task squad --max-tokens 67": "--max-tokens must be above 67, which questions take, got 67",
    "--init-from {run} --task squad --max-tokens 96 --stride 30": "--stride 30 leaves out context: with --max-tokens",
    "--init-from {run} --task squad --max-tokens 96": "train.tsv is not a JSON file",
    "--init-from {run} --resume latest": "invalid choice: 'latest'",
    "--init-from {run} --dev {four}": "four.tsv line 1 must be sentence<TAB>label, got 4 columns: 'gj04",
    "--init-from {run} --dev {strange}": "strange.tsv line 2 has the label '7', but ",
    "--init-from {run} --train {single}": "single.tsv has only the label 'a': classification needs at least two",
    "--init-from {run} --train {header}": "header.tsv line 1 has the label 'category', which no other line has",
    "--init-from {run} --train {blank}": "blank.tsv line 2 must be sentence<TAB>label, got 1 columns: ''",
    "--init-from {run} --train {folder}": "is a folder: give a file in it",
    "--init-from {run} --dev nowhere": "No such file or directory: 'nowhere'",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_bad_input_is_refused_in_one_line(flags, run, tmp_path, refuses):
    places = {"run": run, "folder": tmp_path}
    for name in ("bare", "swapped", "foreign", "unfinished"):
        places[name] = tmp_path / name
        shutil.copytree(run, places[name])
    (places["bare"] / TOKENIZER).unlink()
    with open(places["swapped"] / TOKENIZER, "ab") as file:
        file.write(b"\0")
    checkpoints.save(places["foreign"], {"model": {}})
    checkpoints.save(places["unfinished"], checkpoints.load(run) | {"step": 7})
    for name, content in {
        "four": "gj04\t1\t\tThe sailors rode.\n",
        "strange": "one\tzebra\ntwo\t7\n",
        "single": "one\ta\ntwo\ta\n",
        "header": "text\tcategory\none\ta\ntwo\tb\n",
        "blank": "one\ta\n\ntwo\tb\n",
    }.items():
        places[name] = tmp_path / f"{name}.tsv"
        places[name].write_text(content)
    files = {"--train": write_sentences(tmp_path / "train.tsv", 9, 0), "--dev": write_sentences(tmp_path / "dev.tsv", 9, 0)}
    words = flags.format(**places)
    defaults = {**files, "--task": "sentences", "--max-tokens": 96, "--save-dir": tmp_path / "made", "--device": "cpu"}
    words += "".join(f" {flag} {value}" for flag, value in defaults.items() if flag not in words.split())
    refuses(finetune.main, words, ERRORS[flags].format(**places))
    assert not (tmp_path / "made").exists()


def test_a_loss_that_is_not_finite_ends_the_run(sentences, tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune.main([*sentences, "--lr", "1e30", "--save-dir", str(tmp_path / "run")])
    assert "finetune.py: error: the loss of epoch 1 is not finite: a lower --lr may help" in capsys.readouterr().err
    assert read_json(tmp_path / "run" / "status.json")["status"] == "failed"


def test_sentences_longer_than_the_limit_are_cut_with_a_word(sentences, tmp_path, capsys):
    finetune.main([*sentences, "--epochs", "1", "--max-tokens", "4", "--save-dir", str(tmp_path / "run")])
    assert "200 of 200 sentences of --train are truncated to 4 tokens" in capsys.readouterr().err


def test_the_rate_rises_and_falls_to_nothing():
    config = FinetuneConfig(init_from=Path("x"), task="sentences", train=Path("x"), dev=Path("x"), lr=1.0, warmup=0.2)
    training = object.__new__(finetune.Finetuning)
    training.config, training.steps = config, 10
    rates = []
    for training.step in range(10):
        rates.append(training.learning_rate())
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
