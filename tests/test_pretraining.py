"""Pre-training end to end: masks and batches, learning, exact resume, parallel training, both optimizers, bad input."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bert_pretraining import prepare
from bert_pretraining.config import PretrainingConfig
from bert_pretraining.data import IGNORED, Feed, Masks, PretrainingData, hashed, read_streams
from bert_pretraining.model import EncoderConfig, MaskedLanguageModel
from bert_pretraining.rows import PROGRAM
from bert_pretraining.text import BOS, EOS, MASK, SPECIALS, Corpus
from bert_pretraining.train import main
from bert_pretraining.training import learning_rate, masked_loss
from common.experiments import checkpoints
from common.experiments.files import ROOT, read_json
from common.experiments.graph import StepGraph
from common.linalg import frobenius_norm

SMALL = "--layers 1 --embed-dim 32 --heads 2 --positions alibi --seq 16 --batch-size 8 --epoch-steps 4 --lr 1e-2 --device cpu"
BOTH = "--rank-scale 0.5 --spectral-quekey --spectral-outval --wd2fd-quekey --wd2fd-outval"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder of the embedded corpus."""
    dest = tmp_path_factory.mktemp("corpus") / "numbers"
    prepare.main(["--corpus", "numbers", "--dest", str(dest)])
    return dest


@pytest.fixture
def train(folder, capsys):
    """Run the program in this process; returns the directory of its run."""

    def run(flags, save_dir, base=SMALL):
        main([str(folder), *base.split(), *flags.split(), "--save-dir", str(save_dir)])
        return Path(capsys.readouterr().out.strip()).parent

    return run


def make_data(folder, **options):
    corpus = Corpus(folder)
    return PretrainingData(
        read_streams(corpus), corpus.words, **({"seq": 16, "predictions": 3, "batch_size": 8, "seed": 1} | options)
    )


def log(directory):
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records]


def weights(directory):
    return checkpoints.load(directory / "checkpoint.pt")["model"]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def splitmix64(key, counter):
    """The published generator in Python's integers."""
    mixed = (counter * 0x9E3779B97F4A7C15 + key) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)


def test_hashes_are_splitmix64_without_the_sign():
    key = 2**63 + 12345
    counters = [0, 1, 2, 10**6, 2**40 + 7]
    assert hashed(key, torch.tensor(counters)).tolist() == [splitmix64(key, counter) % 2**63 for counter in counters]


def test_masks_have_the_counts_of_the_paper():
    tokens = torch.randint(SPECIALS, 500, (4000, 20), generator=torch.Generator().manual_seed(0))
    batch = Masks(3, 4, 500)(tokens, 0)
    held, put = tokens.gather(1, batch.positions), batch.tokens.gather(1, batch.positions)
    assert batch.targets.equal(held.flatten())
    assert (batch.positions.diff(dim=1) > 0).all()  # distinct positions
    number = 16_000
    for share, count in ((0.8, (put == MASK).sum()), (0.1, (put == held).sum()), (0.1, ((put != MASK) & (put != held)).sum())):
        assert abs(count.item() - share * number) < 4 * math.sqrt(number * share * (1 - share)) + number / 500
    replaced = put[(put != MASK) & (put != held)]
    assert (replaced >= SPECIALS).all()
    assert len(replaced.unique()) > 450
    places = torch.bincount(batch.positions.flatten(), minlength=20)
    assert (places - 800).abs().max() < 5 * math.sqrt(16_000 * 0.05 * 0.95)
    rest = torch.ones_like(tokens, dtype=torch.bool).scatter_(1, batch.positions, False)
    assert batch.tokens[rest].equal(tokens[rest])


def test_what_is_no_text_is_not_masked():
    tokens = torch.full((6, 10), EOS)
    tokens[:, 0], tokens[:, 4] = BOS, 7
    batch = Masks(0, 3, 100)(tokens, 0)
    assert batch.targets.view(6, 3).eq(7).sum(1).eq(1).all()
    assert batch.targets.eq(IGNORED).sum() == 12
    assert batch.tokens[tokens != 7].equal(tokens[tokens != 7])


def test_masks_depend_on_seed_step_and_position_alone(folder):
    tokens = torch.randint(SPECIALS, 90, (8, 16))
    whole = Masks(5, 3, 100)(tokens, 40)
    part = Masks(5, 3, 100)(tokens[3:5], 43)
    assert part.tokens.equal(whole.tokens[3:5])
    assert not Masks(5, 3, 100)(tokens, 41).positions.equal(whole.positions)
    assert not Masks(6, 3, 100)(tokens, 40).positions.equal(whole.positions)
    data = make_data(folder)
    first, again = data.train_batch(7), make_data(folder).train_batch(7)
    assert first.tokens.equal(again.tokens)
    assert not first.tokens.equal(make_data(folder, seed=2).train_batch(7).tokens)
    halves = [data.train_batch(7, rank=rank, world_size=2) for rank in range(2)]
    assert torch.cat([half.tokens for half in halves]).equal(first.tokens)
    assert torch.cat([half.targets for half in halves]).equal(first.targets)


def test_a_pass_has_every_sequence_once_in_an_order_of_its_own(folder):
    data = make_data(folder, batch_size=32)
    orders = [data.order(number) for number in range(2)]
    assert not orders[0].equal(orders[1])
    assert orders[0].sort().values.equal(torch.arange(data.sequences("train")))
    stream = torch.from_numpy(Corpus(folder).tokens("train").astype("int64"))
    rows = data._sequences("train", torch.tensor([0, 5]))
    assert rows[:, 0].eq(BOS).all()
    assert rows[:, 1:].flatten().equal(torch.cat([stream[:15], stream[75:90]]))


def test_the_feed_gives_the_batches_of_all_passes(folder):
    data = make_data(folder, batch_size=4096)
    feed = Feed(data)
    assert data.steps_per_pass < 12
    feed.start(2)
    for step in range(2, 12):
        if step % data.steps_per_pass == 0:
            feed.start(step)
        batch, wanted = feed.next(), data.train_batch(step)
        assert batch.tokens.equal(wanted.tokens)
        assert batch.positions.equal(wanted.positions)
        assert batch.targets.equal(wanted.targets)


def test_evaluation_sees_every_sequence_under_the_same_masks(folder):
    batches = list(make_data(folder).evaluation_batches("valid"))
    others = list(make_data(folder, seed=9).evaluation_batches("valid"))
    assert all(one.tokens.equal(other.tokens) for one, other in zip(batches, others, strict=True))
    assert sum(len(batch.tokens) for batch in batches) == make_data(folder).sequences("valid")
    halves = [list(make_data(folder).evaluation_batches("valid", rank=rank, world_size=2)) for rank in range(2)]
    assert sum(len(batch.tokens) for half in halves for batch in half) == make_data(folder).sequences("valid")


def test_parts_of_a_batch_add_up_to_its_loss(folder):
    torch.manual_seed(0)
    data = make_data(folder)
    model = MaskedLanguageModel(EncoderConfig(data.words, 32, 64, 1, 2)).double()
    batch = data.train_batch(0)
    loss, sums = masked_loss(model, batch)
    parts = [masked_loss(model, part) for part in batch.chunk(4)]
    torch.testing.assert_close(sum(part for part, _ in parts) / 4, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(part for _, part in parts), sums, rtol=1e-6, atol=0)
    logits = model(batch.tokens, batch.positions)
    explicit = -logits.log_softmax(1)[torch.arange(len(batch.targets)), batch.targets].mean()
    torch.testing.assert_close(loss.double(), explicit, rtol=1e-6, atol=0)


def test_the_rate_rises_and_falls_as_in_the_parent_recipe():
    config = PretrainingConfig(data=Path("d"), steps=100, warmup=0.2, lr=1.0, lr_power=0.5)
    assert learning_rate(config, 0) == 0.05
    assert learning_rate(config, 19) == 1.0
    assert learning_rate(config, 20) == math.sqrt(0.8)
    assert learning_rate(config, 99) == pytest.approx(math.sqrt(0.01))
    linear = PretrainingConfig(data=Path("d"), steps=100, warmup=0.0, lr=2.0)
    assert [learning_rate(linear, step) for step in (0, 50)] == [2.0, 1.0]


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_it_learns_and_records(train, tmp_path, optimizer):
    run = train(f"{BOTH} --optimizer {optimizer} --frobenius-decay 0.1 --steps 60 --epoch-steps 30", tmp_path / "r")
    result = read_json(run / "result.json")
    assert result["config"]["optimizer"] == optimizer
    assert {"group": "factors", "tensors": 4, "frobenius_decay": 0.1} in result["decays"]
    assert {"group": "norms", "tensors": 3, "weight_decay": 0.0} in result["decays"]
    assert set(result["inputs"]) == {"tokenizer", "train", "valid", "test"}
    records = log(run)
    assert [record["step"] for record in records] == [0, 30, 60]
    assert records[-1]["valid_loss"] < 0.9 * math.log(256)
    assert records[-1]["valid_perplexity"] == pytest.approx(math.exp(records[-1]["valid_loss"]))
    assert result["metrics"]["best"] == min(record["valid_loss"] for record in records[1:])
    assert result["metrics"]["valid_loss"] == records[-1]["valid_loss"]
    assert math.isfinite(result["metrics"]["final"])
    assert (run / "tokenizer.model").exists()
    state = checkpoints.load(run / "checkpoint.pt")
    model = MaskedLanguageModel(EncoderConfig(**state["architecture"]))
    model.load_state_dict(state["model"])
    attention = model.layers[0].self_attention
    norm = frobenius_norm([factor.double() for factor in attention.query_key("q").factors()]).mean().item()
    assert records[-1]["quekey_norm"] == pytest.approx(norm, rel=1e-6)


def test_a_run_is_a_function_of_its_seed(train, tmp_path):
    first, second = (train("--steps 5 --seed 3", tmp_path / name) for name in "ab")
    assert_same(weights(first), weights(second))
    assert log(first) == log(second)
    other = train("--steps 5 --seed 4", tmp_path / "c")
    assert not weights(first)["norm.weight"].equal(weights(other)["norm.weight"])


@pytest.mark.parametrize("flags", [BOTH, f"{BOTH} --optimizer adamw", "--rank-scale-layers 0.5 --wd2fd --spectral"])
def test_a_run_that_stops_within_an_epoch_resumes_bit_for_bit(train, tmp_path, flags):
    flags += " --dropout 0.1 --update-freq 2 --clip-norm 1 --steps 10"
    whole = train(flags, tmp_path / "whole")
    parts = train(f"{flags} --max-steps 6", tmp_path / "parts")
    assert checkpoints.load(parts / "checkpoint.pt")["step"] == 6
    parts = train(f"{flags} --resume auto", tmp_path / "parts")
    assert_same(weights(whole), weights(parts))
    assert log(whole)[-1] == log(parts)[-1]
    assert read_json(whole / "result.json")["metrics"] == read_json(parts / "result.json")["metrics"]


def test_accumulation_equals_the_whole_batch(train, tmp_path):
    """With LAMB and a large eps: a small step of AdamW is the sign of its gradient, which rounding can flip near zero."""
    flags = f"{BOTH} --rank-scale-layers 0.5 --wd2fd --spectral --frobenius-decay 0.5 --eps 1e-2 --steps 4"
    whole, parts = train(flags, tmp_path / "a"), train(f"{flags} --update-freq 4", tmp_path / "b")
    assert read_json(whole / "result.json")["config_hash"] == read_json(parts / "result.json")["config_hash"]
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-4, atol=1e-6)


def test_two_processes_with_accumulation_equal_one(train, folder, tmp_path):
    flags = f"{BOTH} --frobenius-decay 0.5 --eps 1e-2 --steps 4 --update-freq 2"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = str(ROOT / "bert_pretraining" / "train.py")
    command = [*launch, program, str(folder), *SMALL.split(), *flags.split(), "--save-dir", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = train(flags, tmp_path / "one"), tmp_path / "two"
    assert read_json(two / "result.json")["environment"]["processes"] == 2
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-4, atol=1e-6)
    ours, theirs = read_json(one / "result.json")["metrics"], read_json(two / "result.json")["metrics"]
    assert theirs["final"] == pytest.approx(ours["final"], rel=1e-5)


def test_a_second_phase_starts_from_the_weights_of_the_first(train, tmp_path):
    flags = f"{BOTH} --positions learned --max-positions 32"
    first = train(f"{flags} --steps 4", tmp_path / "first")
    config = read_json(first / "result.json")["config_hash"]
    phase = f"{flags} --seq 32 --init-from {first} --pretraining {config}"
    second = train(f"{phase} --steps 1 --lr 0", tmp_path / "second")
    assert_same(weights(first), weights(second))
    assert read_json(second / "result.json")["inputs"]["init_from"]


def test_with_alibi_a_second_phase_may_allow_longer_sequences(train, tmp_path):
    first = train(f"{BOTH} --max-positions 16 --steps 4", tmp_path / "first")
    second = train(f"{BOTH} --max-positions 32 --seq 32 --init-from {first} --steps 1 --lr 0", tmp_path / "second")
    assert_same(weights(first), weights(second))


def test_a_checkpoint_is_evaluated_as_in_training(train, folder, tmp_path, capsys):
    run = train("--steps 4", tmp_path / "r")
    large = ["--batch-size", "60000"]  # more than the training split has
    main([str(folder), *SMALL.split(), *large, "--evaluate", "--resume", str(run)])
    measured = json.loads(capsys.readouterr().out)
    metrics = read_json(run / "result.json")["metrics"]
    assert measured["test"]["loss"] == metrics["final"]
    assert measured["valid"]["loss"] == metrics["valid_loss"]


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_recorded_steps_are_the_steps(train, tmp_path, monkeypatch, optimizer):
    """With a fake recorder that runs the step eagerly: batches of the feed, a tensor as step number, grouped composition."""
    flags = f"{BOTH} --rank-scale-layers 0.5 --wd2fd --spectral --optimizer {optimizer} --eps 1e-2 --steps 6"
    plain = train(flags, tmp_path / "plain")
    graphs = []

    def recorded(self, *args, **options):
        made(self, *args, **options)
        self._record = lambda step, stream: step
        graphs.append(self)

    made = StepGraph.__init__
    monkeypatch.setattr(StepGraph, "__init__", recorded)
    from bert_pretraining.training import PretrainingLoop

    build = PretrainingLoop.__init__
    monkeypatch.setattr(PretrainingLoop, "_why_eager", lambda self: None)
    monkeypatch.setattr(
        PretrainingLoop, "__init__", lambda self, *args, **options: build(self, *args, record=lambda step, _: step, **options)
    )
    again = train(flags, tmp_path / "again")
    assert [graph.recordings for graph in graphs] == [1]
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(again)[name], value, rtol=1e-3, atol=1e-5)


def test_flags_that_do_not_fit_are_refused_in_one_line(folder, refuses, tmp_path):
    for flags, message in (
        ("--batch-size 100000", "fewer than a batch of 100000: lower --batch-size"),
        ("--batch-size 8 --update-freq 3", "--batch-size 8 is not divisible by --update-freq 3"),
        ("--positions learned --max-positions 8", "--seq 16 is longer than --max-positions 8"),
        ("--positions alibi --max-positions 8", "--seq 16 is longer than --max-positions 8"),
        ("--rank-scale 0.01", "leaves none of the 16 dimensions of a head"),
        ("--positions rotary", "rotation gives a different query-key product at every distance"),
        ("--predictions 16", "--predictions must be below --seq, got 16 of 16"),
        ("--wd2fd", "--wd2fd needs factorized layers"),
        ("--wd2fd --rank-scale-layers 1", "--wd2fd needs factorized layers"),
        ("--quekey-init norm-matched", "needs narrow heads"),
        ("--spectral-from narrow", "needs --spectral-quekey or --spectral-outval"),
        ("--frobenius-decay 0.1", "--frobenius-decay needs --wd2fd"),
        ("--init-from nowhere", "there is no checkpoint at nowhere"),
        ("--pretraining abc", "--pretraining needs --init-from"),
        ("--heads 3", "--embed-dim 32 is not divisible by --heads 3"),
        ("--lr-power -1", "must be finite and not negative"),
        ("--warmup 1", "must be in [0, 1)"),
        ("--amp fp16", "needs a GPU"),
    ):
        refuses(main, f"{folder} {SMALL} {flags} --save-dir {tmp_path / 'r'}", message)
        assert not (tmp_path / "r").exists()
    refuses(main, f"{tmp_path / 'none'} {SMALL}", "none")


def test_checkpoints_of_other_models_tokenizers_and_makers_are_refused(train, folder, refuses, tmp_path):
    run = train("--steps 4", tmp_path / "r")
    start = f"{folder} {SMALL} --save-dir {tmp_path / 's'} --init-from"
    refuses(main, f"{start} {run} --rank-scale 0.5", "holds another model: rank_scale 0.0 there, 0.5 here")
    refuses(main, f"{start} {run} --spectral-quekey", "holds another model: quekey_init 'regular' there, 'spectral' here")
    refuses(main, f"{start} {run} --init-std 7", "holds another model: init_std 0.0979")
    refuses(main, f"{start} {run} --pretraining 0123456789ab", "--pretraining requires 0123456789ab")
    state = checkpoints.load(run / "checkpoint.pt") | {"tokenizer": "0" * 12}
    torch.save(state, tmp_path / "other.pt")
    refuses(main, f"{start} {tmp_path / 'other.pt'}", "was trained with the tokenizer 000000000000")

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"model": Hostile()}, tmp_path / "hostile2.pt")
    for name in ("hostile.pt", "hostile2.pt"):
        refuses(main, f"{start} {tmp_path / name}", " as a checkpoint: it ")
    assert not (tmp_path / "owned").exists()


def test_every_row_has_a_configuration_and_a_second_phase_names_its_first():
    for table in PROGRAM.tables:
        hashes = [PROGRAM.config_hash(row) for row in table.rows]
        assert len(set(hashes)) == len(hashes)
        for row in table.rows:
            if row.after is not None:
                assert PROGRAM.config(row).pretraining == PROGRAM.config_hash(row.after)
            if hasattr(config := PROGRAM.config(row), "architecture"):
                EncoderConfig(**config.architecture(100))
