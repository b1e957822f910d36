"""Translation with fairseq: the plugin's decay and optimizer, training, stopping and resuming, results, bad input."""

import argparse
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common import FrobeniusDecay
from common.experiments.config import config_hash, identity
from common.experiments.files import ROOT, read_json
from common.experiments.runs import REQUEUE
from common.linalg import frobenius_grads
from transformer_iwslt import engine, generate, prepare, train, translate, watch
from transformer_iwslt.beam import search
from transformer_iwslt.config import TranslationConfig, parse_generate, parse_prepare
from transformer_iwslt.model import PAD, attentions
from transformer_iwslt.rows import PROGRAM, SIGNATURE
from transformer_iwslt.text import find_vocabularies

pytestmark = pytest.mark.skipif(
    engine.find_spec("fairseq") is None, reason="fairseq is not installed: its wheel is for Linux x86_64"
)

TINY = "--embed-dim 16 --ffn-dim 24 --layers 1 --heads 2 --max-tokens 400 --cpu"
HALF = "--rank-scale 0.5 --spectral --spectral-quekey --spectral-outval --wd2fd --wd2fd-quekey --wd2fd-outval"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "numbers"
    prepare.main(f"--corpus numbers --size 400 --bpe 120 --dest {folder}".split())
    return folder


@pytest.fixture(autouse=True)
def as_it_was():
    """Restore the signal handlers, whatever a training run leaves."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def run(data, path, flags, *, fails=None):
    words = [str(data), *f"{TINY} {flags} --save-dir {path}".split()]
    if fails is None:
        train.main(words)
        return engine.load_checkpoint(path / "checkpoint_last.pt")
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    assert stop.value.code == fails
    return None


def lines(path):
    timing = ("wps", "ups", "valid_wps")
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in timing} for record in records]


def test_prepared_data_is_whole(data):
    facts = read_json(data / "prepare.json")
    assert facts["pairs"] == {"train": 400, "valid": 500, "test": 500}
    assert not {path.name for path in data.iterdir()} & {"text", "preprocess.log"}
    assert len((data / "references.test").read_text().splitlines()) == 500
    from fairseq.data import Dictionary

    for lang, vocabulary in zip(("de", "en"), find_vocabularies(data)[1:], strict=True):
        assert Dictionary.load(str(data / f"dict.{lang}.txt")).symbols == vocabulary.words


def test_preparing_again_does_nothing_and_another_way_is_refused(data, capsys, refuses):
    before = {path: path.read_bytes() for path in data.iterdir()}
    prepare.main(f"--corpus numbers --size 400 --bpe 120 --dest {data}".split())
    assert "nothing to do" in capsys.readouterr().err
    refuses(prepare.main, f"--corpus numbers --size 300 --bpe 120 --dest {data}", "was prepared with other settings")
    assert {path: path.read_bytes() for path in data.iterdir()} == before


def test_a_folder_that_lacks_a_file_is_not_taken_for_finished(data, tmp_path, refuses):
    shutil.copytree(data, tmp_path / "d")
    (tmp_path / "d" / "valid.de-en.en.idx").unlink()
    command = f"--corpus numbers --size 400 --bpe 120 --dest {tmp_path / 'd'}"
    refuses(prepare.main, command, "lacks valid.de-en.en.idx: remove the folder, and prepare it again")


def test_dictionaries_are_filled_up_where_that_is_asked_for(data, tmp_path, capsys, refuses):
    """With words that fairseq makes up. A folder prepared before --padding-factor existed has a multiple of 8 words."""
    assert read_json(data / "prepare.json")["padding_factor"] == 1
    assert not any("madeupword" in (data / f"dict.{lang}.txt").read_text() for lang in ("de", "en"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "d").symlink_to(tmp_path / "disk")  # a link to an empty folder is followed
    command = f"--corpus numbers --size 400 --bpe 120 --dest {tmp_path / 'd'}"
    prepare.main(f"{command} --padding-factor 8".split())
    assert (tmp_path / "disk" / "dict.de.txt").is_file()
    for vocabulary, plain in zip(find_vocabularies(tmp_path / "d")[1:], find_vocabularies(data)[1:], strict=True):
        assert len(vocabulary) % 8 == 0
        assert vocabulary.words[: len(plain)] == plain.words
    assert "padding_factor" not in read_json(tmp_path / "d" / "prepare.json")  # as before the flag existed, to the byte
    for same in ("", " --padding-factor 8"):
        prepare.main(f"{command}{same}".split())
        assert "nothing to do" in capsys.readouterr().err
    refuses(prepare.main, f"{command} --padding-factor 1", "was prepared with other settings")


def test_a_run_trains_and_leaves_its_records(data, tmp_path, capsys):
    state = run(data, tmp_path, f"{HALF} --weight-decay 1e-4 --max-update 12 --generate")
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'result.json'}\n"
    assert '"frobenius_decay": 0.0001' in captured.err
    assert "--frobenius-decay is not given: using 0.0001, the value of --weight-decay" in captured.err
    result = read_json(tmp_path / "result.json")
    assert result["status"] == "finished"
    assert result["config_hash"] == config_hash(identity(TranslationConfig, result["config"]))
    model = engine.to_transformer(state, tmp_path / "checkpoint_last.pt")
    assert result["parameters"]["compressed"] == model.report.compressed == sum(p.numel() for p in model.parameters())
    assert {entry["group"]: entry["tensors"] for entry in result["decays"]} == {"rest": 15, "factors": 18 + 12}
    assert set(result["metrics"]) >= {"bleu", "bleu_signature", "sacrebleu", "sacrebleu_signature", "final", "best"}
    assert result["metrics"]["bleu_signature"] == SIGNATURE
    records = lines(tmp_path)
    assert [record["epoch"] for record in records] == list(range(1, len(records) + 1))
    assert records[-1]["step"] == 12
    expected = {f"{f}_{kind}" for f in ("layers", "query_key", "output_value") for kind in ("frobenius_norm", "nuclear_norm")}
    assert expected <= set(records[0])
    for family in ("layers", "query_key", "output_value"):
        norms = [records[0][f"{family}_{kind}"] for kind in ("frobenius_norm", "nuclear_norm", "nuclear_norm_bound")]
        assert norms == sorted(norms)
    status = read_json(tmp_path / "status.json")
    assert status["status"] == "finished"
    assert train.main([str(data), *f"{TINY} {HALF} --weight-decay 1e-4 --max-update 12 --save-dir {tmp_path}".split()]) is None
    assert "nothing to do" in capsys.readouterr().err


def test_the_last_epochs_norms_are_those_of_the_checkpoint(data, tmp_path):
    state = run(data, tmp_path, f"{HALF} --max-update 5 --validate-interval-updates 2")
    model = engine.to_transformer(state, tmp_path)
    pairs = [attention.query_key(name) for name, attention in attentions(model).items()]
    products = [(u @ vt).double() for pair in pairs for u, vt in zip(*pair.factors(), strict=True)]
    last = lines(tmp_path)[-1]
    frobenius = sum(torch.linalg.matrix_norm(product).item() for product in products) / len(products)
    nuclear = sum(torch.linalg.matrix_norm(product, "nuc").item() for product in products) / len(products)
    assert last["query_key_frobenius_norm"] == pytest.approx(frobenius, rel=1e-5)
    assert last["query_key_nuclear_norm"] == pytest.approx(nuclear, rel=1e-5)


@pytest.mark.parametrize("batches", ["once", "each-epoch"])
def test_stopped_and_gone_on_is_uninterrupted(data, tmp_path, monkeypatch, batches):
    """Stopped by a scheduler's signal, within an epoch and at its last update; with momentum, dropout and patience."""
    flags = f"{HALF} --max-update 30 --patience 9 --batches {batches}"
    whole = run(data, tmp_path / "whole", flags)
    ends = [record["step"] for record in lines(tmp_path / "whole")]
    assert len(ends) > 2
    heartbeat = watch.Watch.before_step

    def stop_at(*steps):
        def before_step(self, updates):
            if updates in steps:
                os.kill(os.getpid(), signal.SIGTERM)
            heartbeat(self, updates)

        monkeypatch.setattr(watch.Watch, "before_step", before_step)

    for step, stopped in ((3, 4), (ends[0] - 1, ends[0] + 1), (ends[1] - 1, ends[1] + 1), (28, 29)):
        stop_at(step)
        run(data, tmp_path / "parts", flags, fails=REQUEUE)
        assert read_json(tmp_path / "parts" / "status.json")["status"] == "stopped"
        held = engine.load_checkpoint(tmp_path / "parts" / "checkpoint_last.pt")
        assert held["optimizer_history"][-1]["num_updates"] == stopped
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(watch.Watch, "before_step", heartbeat)
    parts = run(data, tmp_path / "parts", flags)
    for name, value in whole["model"].items():
        assert torch.equal(parts["model"][name], value), name
    for one, other in zip(*(s["last_optimizer_state"]["state"].values() for s in (whole, parts)), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    best = [engine.load_checkpoint(tmp_path / name / "checkpoint_best.pt") for name in ("whole", "parts")]
    assert best[0]["extra_state"]["val_loss"] == best[1]["extra_state"]["val_loss"]
    counted = [state["extra_state"]["ObservedTranslation"] for state in (whole, parts)]
    assert counted[0] == counted[1] != {}


def test_a_finished_training_is_not_gone_on_with(data, tmp_path):
    before = run(data, tmp_path, "--max-update 4")
    (tmp_path / "trained.json").unlink()  # killed between its last checkpoint and its end
    after = run(data, tmp_path, "--max-update 4")
    assert after["optimizer_history"][-1]["num_updates"] == 4
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())


def test_going_on_for_longer_is_another_run_of_the_same_steps(data, tmp_path, capsys, refuses):
    """A run of few steps does not count as the whole run, which resumes from it."""
    run(data, tmp_path / "a", "--max-steps 3 --max-update 6 --generate")
    assert read_json(tmp_path / "a" / "result.json")["config"]["max_steps"] == 3
    longer = run(data, tmp_path / "a", "--max-update 6")
    assert longer["optimizer_history"][-1]["num_updates"] == 6
    assert read_json(tmp_path / "a" / "trained.json")["config"]["max_steps"] is None
    whole = run(data, tmp_path / "whole", "--max-update 6")
    assert all(torch.equal(longer["model"][name], value) for name, value in whole["model"].items())
    command = f"{data} {TINY} --max-update 6 --max-steps 4 --save-dir {tmp_path / 'a'}"
    refuses(train.main, command, "was already trained for 6 updates, more than the 4 requested")


def test_checkpoints_are_copied_whole(tmp_path):
    from fairseq.file_io import PathManager

    engine.load()
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    kept = open(tmp_path / "b")  # noqa: SIM115 (read after it was replaced)
    assert PathManager.copy(str(tmp_path / "a"), str(tmp_path / "b"), overwrite=True)
    assert (kept.read(), (tmp_path / "b").read_text()) == ("old", "new")
    kept.close()


PLAIN = "--dropout 0 --attention-dropout 0 --activation-dropout 0 --optimizer sgd --lr-scheduler fixed --clip-norm 0"


def decayed_gradient(data, tmp_path, flags, coef):
    """The SGD step at learning rate 1 without Frobenius decay minus the step with it, and the closed form in float64."""
    half = f"{HALF} {PLAIN} --max-update 1 {flags}"
    first = run(data, tmp_path / "first", f"{half} --lr 0 --frobenius-decay 0")
    without = run(data, tmp_path / "without", f"{half} --lr 1 --frobenius-decay 0")
    decayed = run(data, tmp_path / "with", f"{half} --lr 1 --frobenius-decay {coef}")
    model = engine.to_transformer(first, tmp_path).double()
    expected = {}
    pairs = [p for n, a in attentions(model).items() for p in (a.query_key(n), a.output_value(n))]
    decay = FrobeniusDecay(model, coef, pairs=pairs)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    covered = {id(parameter) for parameter in decay.parameters()}
    for layer in decay._layers:
        for factor, grad in zip(layer.factors(), frobenius_grads(layer.factors()), strict=True):
            factor.grad += coef * grad
    for pair in pairs:  # by autograd of the explicit products
        u, vt = pair.factors()
        penalty = coef / 2 * (u @ vt).square().sum()
        for parameter, grad in zip((pair.u, pair.vt), torch.autograd.grad(penalty, (pair.u, pair.vt)), strict=True):
            parameter.grad += grad
    for name, parameter in model.named_parameters():
        if id(parameter) in covered:
            expected[name.replace("coder.", "coder.net.", 1)] = parameter.grad
    found = {name: without["model"][name].double() - decayed["model"][name].double() for name in without["model"]}
    return found, expected


@pytest.mark.parametrize("flags", ["", "--update-freq 4", "--sentence-avg --update-freq 3"])
def test_the_decays_gradient_is_the_closed_form_whatever_the_batch(data, tmp_path, flags):
    found, expected = decayed_gradient(data, tmp_path, flags, coef=0.1)
    assert len(expected) == 18 + 12
    for name, step in found.items():
        if name in expected:
            torch.testing.assert_close(step, expected[name], rtol=1e-3, atol=1e-5)
            assert expected[name].abs().max() > 1e-4
        else:
            assert step.abs().max() == 0, name


def two_processes(data, tmp_path, flags):
    """Two gloo processes of train.py with one run directory."""
    rendezvous = f"--distributed-init-method file://{tmp_path}/rendezvous"
    distributed = "--distributed-world-size 2 --distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp"
    words = f"{TINY} {flags} {distributed} {rendezvous} --save-dir {tmp_path}/two --distributed-rank".split()
    command = [sys.executable, str(ROOT / "transformer_iwslt" / "train.py"), str(data), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, env=environment) for rank in (0, 1)]


def test_the_decays_gradient_over_two_processes(data, tmp_path):
    """Two processes make the update that one process makes from the same two batches. The decay counts once."""
    flags = f"{HALF} {PLAIN} --lr 1 --frobenius-decay 0.1 --max-update 1"
    one = run(data, tmp_path / "one", f"{flags} --update-freq 2")
    for process in two_processes(data, tmp_path, flags):
        _, messages = process.communicate(timeout=240)
        assert process.returncode == 0, messages
    two = engine.load_checkpoint(tmp_path / "two" / "checkpoint_last.pt")
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-6)
    assert len(lines(tmp_path / "two")) == 1


def test_a_signal_to_one_process_stops_all(data, tmp_path):
    """The second of two processes gets the signal. Both save at the same update and ask to be queued again."""
    processes = two_processes(data, tmp_path, "--max-update 100000")
    deadline = time.monotonic() + 200
    while not (tmp_path / "two" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    processes[1].terminate()
    for process in processes:
        _, messages = process.communicate(timeout=100)
        assert process.returncode == REQUEUE, messages
    held = engine.load_checkpoint(tmp_path / "two" / "checkpoint_last.pt")
    assert held["extra_state"]["train_iterator"]["iterations_in_epoch"] > 0


@pytest.fixture
def trained(data):
    """Task, model, criterion and a batch, as fairseq makes them from this program's flags."""

    def make(flags, **task_options):
        from fairseq import tasks

        engine.load()
        args = TranslationConfig.parse([str(data), *f"{TINY} {flags}".split()])
        cfg = train.read_fairseq(args, data, len(find_vocabularies(data)[2]))
        torch.manual_seed(0)
        for name, value in task_options.items():
            cfg.task[name] = value
        task = tasks.setup_task(cfg.task)
        model = task.build_model(cfg.model)
        task.load_dataset("valid")
        batch = next(task.get_batch_iterator(task.dataset("valid"), max_sentences=9).next_epoch_itr(shuffle=False))
        return cfg, task, model, task.build_criterion(cfg.criterion), batch

    return make


@pytest.mark.parametrize("criterion", ["cross_entropy", "label_smoothed_cross_entropy"])
def test_without_decay_and_in_validation_the_loss_is_fairseqs(trained, criterion):
    from fairseq.criterions import CRITERION_REGISTRY

    none = "--dropout 0 --attention-dropout 0 --activation-dropout 0"
    cfg, task, model, ours, batch = trained(f"{HALF} {none} --frobenius-decay 0.3 --criterion {criterion}")
    smoothing = (cfg.criterion.label_smoothing,) if criterion == "label_smoothed_cross_entropy" else ()
    theirs = CRITERION_REGISTRY[criterion](task, False, *smoothing)
    model.train()
    loss, size, logged = ours(model, batch)
    plain, plain_size, plain_logged = theirs(model, batch)
    assert (size, logged["ntokens"]) == (plain_size, plain_logged["ntokens"])
    assert torch.equal(logged["loss"], plain_logged["loss"])
    torch.testing.assert_close(loss - plain, size * model.decay.penalty(), rtol=1e-4, atol=1e-3)
    assert model.decay.penalty() > 0
    model.eval()
    assert torch.equal(ours(model, batch)[0], theirs(model, batch)[0])
    model.train().decay.coef = 0.0
    assert torch.equal(ours(model, batch)[0], theirs(model, batch)[0])


@pytest.mark.parametrize("over", ["all", "others"])
def test_label_smoothing_is_spread_over_all_words_or_all_but_the_right_one(trained, over):
    """The wanted distribution of each target: the smoothing moves probability from the correct word evenly to those words."""
    _, _, model, criterion, batch = trained(f"--label-smoothing 0.3 --smoothed-over {over}")
    loss, size, _ = criterion(model.eval(), batch)
    logs = model(**batch["net_input"])[0].double().log_softmax(-1)
    target, words = batch["target"], logs.shape[-1]
    wanted = torch.full_like(logs, 0.3 / (words if over == "all" else words - 1))
    wanted.scatter_(-1, target[..., None], 0.7 + (0.3 / words if over == "all" else 0))
    torch.testing.assert_close(wanted.sum(-1), torch.ones_like(target, dtype=torch.float64))
    expected = -(wanted * logs).sum(-1)[target != PAD].sum()
    assert size == (target != PAD).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("when", ["once", "each-epoch"])
def test_batches_are_composed_once_or_in_each_epoch(trained, when):
    """Each epoch has all sentences, in its own order. The validation batches stay the same."""
    cfg, task, _, _, _ = trained(f"--batches {when}")
    task.load_dataset("train")

    def batches(split, start, count):
        made = task.get_batch_iterator(dataset=task.dataset(split), max_tokens=100, seed=1, epoch=start, num_workers=0)
        made.load_state_dict({"version": 2, "epoch": start, "iterations_in_epoch": 0})  # as resumed training does
        epochs = [[frozenset(batch["id"].tolist()) for batch in made.next_epoch_itr()] for _ in range(count)]
        task.dataset_to_epoch_iter.clear()
        return epochs

    first, second, third = batches("train", 1, 3)
    for epoch in (first, second, third):
        assert sorted(number for batch in epoch for number in batch) == list(range(400))
    assert first != second != third
    assert ({*first} == {*second}, {*second} == {*third}) == (when == "once",) * 2
    assert len({*first} & {*second}) < 5 or when == "once"
    (gone_on,) = batches("train", 3, 1)
    assert gone_on == third
    before, after = batches("valid", 1, 2)
    assert {*before} == {*after}
    assert cfg.task.rebuild_batches == (when == "each-epoch")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_weight_decay_leaves_out_what_frobenius_decay_covers(trained, precision):
    """In half precision, fairseq's optimizer holds float32 copies, which keep the mark if gradients are not flattened."""
    from fairseq import optim

    cfg, _, model, _, _ = trained("--rank-scale 0.5 --wd2fd --wd2fd-outval --frobenius-decay 1e-4 --weight-decay 0.01")
    if precision == "float16":
        model.half()
        cfg.common.fp16_no_flatten_grads = True
        optimizer = optim.FP16Optimizer.build_optimizer(cfg, list(model.parameters()))
    else:
        optimizer = optim.build_optimizer(cfg.optimizer, list(model.parameters()))
    rest, exempt = optimizer.param_groups
    assert (rest["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    assert sorted(p.numel() for p in exempt["params"]) == sorted(p.numel() for p in model.decay.parameters())
    assert len(rest["params"]) + len(exempt["params"]) == len(list(model.parameters()))


def test_half_precision_keeps_gradients_apart_where_decays_differ():
    flags = ["data", "--rank-scale", "0.5", "--wd2fd", "--weight-decay", "1e-4", "--fp16"]
    assert "--fp16-no-flatten-grads" in TranslationConfig.parse(flags).fairseq_words(ROOT)
    assert "--fp16-no-flatten-grads" not in TranslationConfig.parse([*flags[:3], *flags[4:]]).fairseq_words(ROOT)


def test_generation_translations_and_plain_torch_agree(data, tmp_path, capsys, monkeypatch):
    """fairseq's beam search, ours, and the command for your own sentences, on a model that has learned a little."""
    run(data, tmp_path, "--rank-scale 0.5 --spectral --optimizer adam --lr 0.01 --clip-norm 1 --max-update 60")
    best = tmp_path / "checkpoint_best.pt"
    state = engine.load_checkpoint(best)
    capsys.readouterr()
    command = f"--path {best} --batch-size 128 --beam 3 --remove-bpe --rank-scale 0.5 --dump {tmp_path}/bleu.log --cpu"
    generate.main([str(data), *command.split()])
    output = capsys.readouterr().out.splitlines()
    assert output[-2].startswith("BLEU = ")
    assert (tmp_path / "bleu.log").read_text() == "\n".join(output[-2:]) + "\n"
    folder = next(tmp_path.glob("generate-*"))
    scores = read_json(folder / "scores.json")
    assert scores["decoding"]["beam"] == 3
    assert f"BLEU = {scores['metrics']['bleu']:.2f}" in output[-2]
    assert not (tmp_path / "result.json").exists()
    pipeline, source, target = find_vocabularies(data)
    sources = [line[2:] for line in (folder / "translations.txt").read_text().splitlines() if line.startswith("S ")]
    encoded = [torch.tensor(source.encode(pipeline.split(line))) for line in sources[:100]]
    batch = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=PAD)
    found = search(engine.to_transformer(state, best).eval(), batch, beam=3)
    ours = [pipeline.join(target.decode(words)) for words, _ in found]
    assert len(set(ours)) > 30
    assert ours == output[:100]
    text = "siebenundzwanzig\n\nzwei\xff und \0\n" + "hundert " * 1500 + "\n😀"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "transformer_iwslt" / "translate.py", "--checkpoint", best, "--beam", "2"],
        input=text.encode("latin-1", "replace"),
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.decode().split("\n")) == 5 + 1
    assert done.stdout.split(b"\n")[1] == b""
    assert b"line 3 is not UTF-8" in done.stderr
    assert b"subwords: it is cut into parts of 1021" in done.stderr


def test_translating_needs_no_fairseq():
    code = "import sys; import transformer_iwslt.translate; sys.exit('fairseq' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_generating_as_a_row_does_writes_the_result(data, tmp_path, capsys):
    run(data, tmp_path, "--max-update 3")
    capsys.readouterr()
    generate.main([str(data), "--path", str(tmp_path / "checkpoint_best.pt"), "--quiet", "--cpu"])
    captured = capsys.readouterr()
    assert captured.err == f"{tmp_path / 'result.json'}\n"
    assert len(captured.out.splitlines()) == 2
    metrics = read_json(tmp_path / "result.json")["metrics"]
    assert metrics["bleu"] == metrics["best"]
    assert "final" in metrics


def test_known_scores():
    """A perfect translation scores 100, and a changed one scores as in sacrebleu, on tokenized and on plain text."""
    import sacrebleu

    from transformer_iwslt.text import Pipeline

    pipeline = Pipeline("de", "en", True, "")
    references = ["The cat's on the mat , it sleeps.", "A dog barks loudly at night."]
    tokenized = [pipeline.tokenize(line, "en") for line in references]

    def score(hypotheses, plain):
        return generate.score(
            [{"hypothesis": h, "reference": r} for h, r in zip(hypotheses, tokenized, strict=True)], pipeline, plain
        )

    perfect = score(tokenized, references)
    assert perfect["bleu"] == pytest.approx(100)
    changed = score([tokenized[0].replace("mat", "hat"), tokenized[1]], references)
    expected = sacrebleu.corpus_bleu(
        [tokenized[0].replace("mat", "hat"), tokenized[1]], [tokenized], tokenize="none", force=True
    )
    assert changed["bleu"] == pytest.approx(expected.score)
    assert 50 < changed["bleu"] < 100
    assert "case:lc" in changed["sacrebleu_signature"]
    assert score(tokenized, None)["sacrebleu"] == pytest.approx(100)
    for hypothesis, expected in (("a b c d e", 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25), ("a b x d e", 0.0)):
        found = generate.score([{"hypothesis": hypothesis, "reference": "a b c d f"}], pipeline, None)
        assert found["bleu"] == pytest.approx(expected)  # precisions by hand, and no smoothing of those that are zero
    with pytest.raises(ValueError, match="there are 2 translations and 1 references"):
        score(tokenized, references[:1])


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_hostile_and_damaged_checkpoints_are_refused(data, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoint_last.pt"
    path.parent.mkdir()
    state = {"cfg": {"model": argparse.Namespace(rank_scale=0.5)}, "model": {}, "code": Hostile()}
    torch.save(state, path)
    commands = [
        (train.main, f"{data} {TINY} --save-dir run"),
        (generate.main, f"{data} --path run/checkpoint_last.pt"),
        (translate.main, "--checkpoint run/checkpoint_last.pt"),
    ]
    for main, command in commands:
        refuses(main, command, "objects whose loading could run code")
    path.write_bytes(path.read_bytes()[:300])
    for main, command in commands:
        refuses(main, command, "it is damaged")
    torch.save({"model": {}}, path)
    for main, command in commands:
        refuses(main, command, "is not a checkpoint of transformer_iwslt/train.py")
    state.pop("code")
    torch.save(state | {"extra_state": {}, "optimizer_history": [{"num_updates": 0}]}, path)
    refuses(generate.main, commands[1][1], "it lacks encoder.net.embed_tokens")
    assert not (tmp_path / "pwned").exists()


def test_data_that_do_not_fit_a_checkpoint_are_refused(data, tmp_path, refuses):
    run(data, tmp_path / "run", "--max-update 1")
    best = tmp_path / "run" / "checkpoint_best.pt"
    refuses(generate.main, f"{data} --path {best} --rank-scale 0.25", "--rank-scale 0.25 differs from 0 of")
    prepare.main(f"--corpus numbers --size 400 --bpe 60 --dest {tmp_path / 'other'}".split())
    refuses(generate.main, f"{tmp_path / 'other'} --path {best}", "give the folder that it was trained on")
    refuses(translate.main, f"--checkpoint {best} --vocabulary {tmp_path / 'other'}", "dictionary of")
    lines = (data / "dict.de.txt").read_text().splitlines()
    (tmp_path / "run" / "vocabulary" / "dict.de.txt").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    refuses(generate.main, f"{data} --path {best}", "differs from that in")
    with pytest.raises(ValueError, match="does not hold a finished training run"):
        generate.write_result(tmp_path, data)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("DATA --arch transformer_huge", "invalid choice: 'transformer_huge'"),
        ("DATA --rank-scale 1.2", "must be in [0, 1], where 0 and 1 factorize nothing, got 1.2"),
        ("DATA --wd2fd", "--wd2fd needs factorized layers: give --rank-scale above 0 and below 1, got 0"),
        ("DATA --spectral --rank-scale 1", "--init spectral needs factorized layers"),
        ("DATA --frobenius-decay 1e-4", "--frobenius-decay needs --wd2fd"),
        ("DATA --wd2fd-quekey --frobenius-decay -1", "must be finite and not negative, got -1"),
        ("DATA --heads 3", "--embed-dim 256 is not divisible by --heads 3"),
        ("DATA --dropout 1", "must be in [0, 1), got 1"),
        ("DATA --optimizer adam", "--optimizer adam needs --lr"),
        ("DATA --optimizer nah --lr 1", "fairseq: argument --optimizer: invalid choice: 'nah'"),
        ("DATA --embdim 3", "fairseq: unrecognized arguments: --embdim 3"),
        ("--update-freq 2 DATA", "DATA must come before the flags"),
        ("DATA other", "unrecognized arguments: other"),
        ("~nobody-of-this-name", "argument DATA: names the home directory of an unknown user"),
        ("nowhere", "there is no folder nowhere: python transformer_iwslt/prepare.py --dest nowhere"),
        ("EMPTY", "has no prepare.json: it was not written by prepare.py"),
        ("DATA --distributed-world-size 2 --cpu", "--distributed-world-size 2 needs as many GPUs, and there are 0"),
        ("DATA --fp16 --cpu", "--fp16 needs a GPU"),
        ("DATA --bf16 --cpu", "--bf16 needs a GPU"),
        ("DATA/ --fp16 --cpu", "--fp16 needs a GPU"),
        ("DATA --max-source-positions 4", "subwords, including its end, but the model reads at most 4: prepare the data"),
        ("DATA --rebuild-batches", "--rebuild-batches cannot be passed on to fairseq"),
        ("DATA --criterion cross_entropy --smoothed-over all", "--smoothed-over needs label_smoothed_cross_entropy"),
        ("DATA --criterion cross_entropy --label-smoothing 0.3", "--label-smoothing needs label_smoothed_cross_entropy"),
        ("DATA --lr-scheduler cosine --max-steps 9", "--max-steps 9 would shorten the schedule of --lr-scheduler cosine"),
        (
            "DATA --lr-scheduler tri_stage --phase-ratio (0.1,0.4,0.5) --max-steps 9",
            "would shorten the schedule of --lr-scheduler tri_stage",
        ),
        ("DATA --lr-scheduler tri_stage --warmup-updates 9", "fairseq: unrecognized arguments: --warmup-updates 9"),
        ("DATA --lr-scheduler polynomial_decay", "fairseq refuses these flags: "),
        ("DATA --left-pad-target", "--left-pad-target cannot be passed on to fairseq"),
        ("DATA -s en", "-s cannot be passed on to fairseq"),
        ("DATA --source-lang en", "--source-lang cannot be passed on to fairseq"),
        ("DATA --curriculum 1", "--curriculum cannot be passed on to fairseq"),
        ("DATA --patience 2 --max-steps 9", "--max-steps 9 would count one more validation for --patience"),
        ("DATA --warmup-updates 0", "--warmup-updates must be at least 1 for inverse_sqrt, got 0"),
        ("DATA --save-dir a:b", "--save-dir a:b has a colon, at which fairseq splits paths"),
        ("DATA --task=translation", "--task cannot be passed on to fairseq"),
        ("DATA --seed 4294967290", "--seed must be below 2^32 minus --max-update"),
    ],
)
def test_bad_flags_of_training(data, tmp_path, monkeypatch, refuses, command, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    save_dir = "" if "--save-dir" in command else " --save-dir run"
    refuses(train.main, f"{command.replace('DATA', str(data))}{save_dir}", message)
    assert not (tmp_path / "run").exists()


def test_sentences_that_do_not_fit_a_batch_are_told_of(data, tmp_path, refuses, capsys):
    command = f"{data} {TINY} --save-dir {tmp_path} --max-update 1"
    refuses(train.main, f"{command} --max-tokens 6", "a batch holds at most 6: give a larger --max-tokens")
    refuses(
        train.main, f"{command} --max-tokens 2 --max-tokens-valid 400", "400 of 400 training pairs have more than 2 subwords"
    )
    assert not list(tmp_path.iterdir())
    run(data, tmp_path / "a", "--max-tokens 6 --max-tokens-valid 400 --max-update 1")
    long = int((engine.sizes(data, "train").max(1) > 6).sum())
    assert 0 < long < 400
    message = f"warning: {long} of 400 training pairs have more than 6 subwords, including the end: training leaves them out"
    assert message in capsys.readouterr().err
    run(data, tmp_path / "b", "--max-tokens 6 --max-update 1 --skip-invalid-size-inputs-valid-test", fails=2)
    assert "error: a sentence is too long for the model or for --max-tokens: Sentences lengths" in capsys.readouterr().err


def texts(folder, **splits):
    """Files of German and English words in a folder, and the flags of prepare.py that name them."""
    for name, pairs in splits.items():
        for side, lang in enumerate(("de", "en")):
            (folder / f"{name}.{lang}").write_text("".join(f"{pair[side]}\n" for pair in pairs))
    return " ".join(f"--{name}-prefix {folder / name}" for name in splits)


def test_a_sentence_that_is_too_long_is_found_before_the_training(tmp_path, monkeypatch, refuses, capsys):
    """By its line in preparation. In data prepared without this check, it is found before training starts."""
    pairs = [(f"eins {word}", f"one {word}") for word in "abcdefgh"]
    long = ("zwei " * 1100, "two " * 1000)
    flags = texts(tmp_path, train=[*pairs, long], valid=pairs, test=[("", ""), *pairs, long])
    command = f"{flags} --dest {tmp_path / 'data'} --bpe 30"
    message = (
        f"{tmp_path / 'test.de'}, line 10, has 1,100 subwords, but the model reads at most 1,021: shorten or remove this pair"
    )
    refuses(prepare.main, command, message)
    assert not (tmp_path / "data").exists()
    texts(tmp_path, valid=[*pairs[:2], ("zwei", "two " * 1022)])
    refuses(prepare.main, command, f"{tmp_path / 'valid.en'}, line 3, has 1,022 subwords")
    texts(tmp_path, valid=pairs)
    monkeypatch.setattr(prepare, "check_lengths", lambda split, place: None)  # as an earlier version prepared it
    prepare.main(command.split())
    captured = capsys.readouterr()
    assert "warning: 1 train pairs have more than 1,021 subwords: training leaves them out" in captured.err
    message = (
        f"sentence 9 of test.de in {tmp_path / 'data'} has 1,101 subwords, including its end, but the model reads at most 1,022"
    )
    refuses(train.main, f"{tmp_path / 'data'} {TINY} --save-dir {tmp_path / 'run'}", message)
    assert not (tmp_path / "run").exists()


def test_no_sentence_is_left_out_of_a_score(data, tmp_path, refuses):
    command = f"{data} --path {tmp_path / 'x.pt'} --skip-invalid-size-inputs-valid-test"
    refuses(generate.main, command, "would leave sentences out, but BLEU must cover the whole split")


def test_a_folder_is_no_checkpoint_to_translate_with(data, tmp_path, refuses):
    message = f"{tmp_path} is a folder: give a checkpoint in it, such as {tmp_path / 'checkpoint_best.pt'}"
    refuses(generate.main, f"{data} --path {tmp_path}", message)
    refuses(translate.main, f"--checkpoint {tmp_path}", message)


def test_data_may_lie_below_a_home_directory(data, monkeypatch):
    monkeypatch.setenv("HOME", str(data.parent))
    assert TranslationConfig.parse(["~/numbers", "--update-freq", "2"]).data == data
    assert parse_generate(["~/numbers", "--path", "~/x.pt", "--beam-search", "1"]).data == data


def test_a_batch_that_is_too_small_for_a_translation_is_named(data, tmp_path, refuses):
    run(data, tmp_path, "--max-update 1")
    command = f"{data} --path {tmp_path / 'checkpoint_best.pt'} --cpu --max-tokens 4"
    refuses(generate.main, command, "a batch holds at most 4: give a larger --max-tokens")


def test_targets_padded_on_the_left_are_refused(trained):
    with pytest.raises(ValueError, match="--left-pad-target is not supported"):
        trained("--rank-scale 0", left_pad_target=True)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--train-prefix a --dest b", "go together: give all three"),
        ("--corpus numbers --train-prefix a --valid-prefix a --test-prefix a", "exclude each other"),
        ("--train-prefix a --valid-prefix a --test-prefix a", "needs --dest"),
        ("--corpus numbers -s en -t en", "must differ, got en for both"),
        ("--corpus numbers -s en -t de", "is from de to en, got en to de"),
        ("--train-prefix a --valid-prefix a --test-prefix a --dest b -s pt-BR", "--source-lang must be letters, digits and _"),
        ("--train-prefix . --valid-prefix . --test-prefix . --dest b", "names no files: give the PREFIX of PREFIX.de"),
        ("--corpus numbers --dest a:b", "has a colon, at which fairseq splits paths"),
        ("--corpus numbers --size 60000", "at most 50000, got 60000"),
        ("--corpus numbers --sha256 0", "--sha256 needs --corpus iwslt14, got --corpus numbers"),
        ("--corpus numbers --data-dir x", "--data-dir needs --corpus iwslt14, got --corpus numbers"),
        ("--size 5", "--size needs --corpus numbers, got --corpus iwslt14"),
        (
            "--train-prefix a --valid-prefix a --test-prefix a --dest b --seed 0",
            "--seed needs --corpus numbers, got --train-prefix",
        ),
        ("--train-prefix a --valid-prefix a --test-prefix a --dest b", "there is no a.de and no a.de.gz beside it"),
    ],
)
def test_bad_flags_of_preparing(tmp_path, monkeypatch, refuses, command, message):
    monkeypatch.chdir(tmp_path)
    refuses(prepare.main, command, message)
    assert list(tmp_path.iterdir()) == []


def test_without_fairseq_the_error_says_what_to_do(data, tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    for main, command in (
        (train.main, f"{data} --save-dir {tmp_path}/run"),
        (prepare.main, f"--corpus numbers --dest {tmp_path}/d"),
        (generate.main, f"{data} --path x.pt"),
    ):
        refuses(main, command, "ve-fairseq 0.12.3, is for Python 3.11 and 3.12 on Linux x86_64; this is Python")


def test_real_sentences(tmp_path, capsys):
    """Part of Multi30k from FNL_DATA is prepared, trained on for a few updates, translated and scored."""
    source = Path(os.environ.get("FNL_DATA", "nowhere")) / "multi30k"
    if not source.is_dir():
        pytest.skip("FNL_DATA names no folder of real data")
    for name, count in (("train", 600), ("val", 60), ("test_2016_flickr", 60)):
        for lang in ("de", "en"):
            with gzip.open(source / f"{name}.{lang}.gz", "rt", encoding="utf-8") as file:
                (tmp_path / f"{name}.{lang}").write_text("".join(next(file) for _ in range(count)), encoding="utf-8")
    prefixes = f"--train-prefix {tmp_path}/train --valid-prefix {tmp_path}/val --test-prefix {tmp_path}/test_2016_flickr"
    prepare.main(f"{prefixes} --bpe 500 --dest {tmp_path}/data".split())
    assert read_json(tmp_path / "data" / "prepare.json")["pairs"] == {"train": 600, "valid": 60, "test": 60}
    vocabulary = find_vocabularies(tmp_path / "data")[1]
    assert any("ü" in word for word in vocabulary.words)
    run(tmp_path / "data", tmp_path / "run", f"{HALF} --max-tokens 1000 --max-update 5 --generate")
    metrics = read_json(tmp_path / "run" / "result.json")["metrics"]
    assert metrics["sentences"] == 60
    assert 0 <= metrics["bleu"] < 100


def test_bf16_trains_and_resumes_where_fairseq_wants_a_tpu(data, tmp_path, monkeypatch):
    """On a CPU that pretends to be a GPU. On a real one, fairseq moves the model there, as under --fp16."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    flags = f"{TINY.replace('--cpu', '')} {HALF} --weight-decay 1e-4 --bf16 --num-workers 0 --max-update 24"
    words = [str(data), *flags.split(), "--save-dir"]
    train.main([*words, str(tmp_path / "whole")])
    whole = engine.load_checkpoint(tmp_path / "whole" / "checkpoint_last.pt")
    assert all(torch.equal(value, value.bfloat16().float()) for value in whole["model"].values())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    train.main([*words, str(tmp_path / "parts"), "--max-steps", "10"])
    train.main([*words, str(tmp_path / "parts")])
    parts = engine.load_checkpoint(tmp_path / "parts" / "checkpoint_last.pt")
    for name, value in whole["model"].items():  # close, not equal: fairseq's checkpoints hold no float32 weights
        torch.testing.assert_close(parts["model"][name], value, rtol=0.02, atol=0.02)


# ---- flags and rows

README = (
    "--arch transformer_small --clip-norm 0.1 --dropout 0.2 --max-tokens 4000 --criterion label_smoothed_cross_entropy "
    "--label-smoothing 0.1 --lr-scheduler inverse_sqrt --lr 0.25 --optimizer nag --warmup-init-lr 0.25 --warmup-updates 4000 "
    "--max-update 100000 --no-epoch-checkpoints --save-dir results --rank-scale 0.5 --spectral --spectral-quekey "
    "--spectral-outval --wd2fd --wd2fd-quekey --wd2fd-outval --distributed-world-size 1"
)


def test_the_released_codes_command_is_the_default_recipe(capsys):
    given = TranslationConfig.parse(["data-bin/iwslt14.tokenized.de-en", *README.split()])
    short = TranslationConfig.parse(["data-bin/iwslt14.tokenized.de-en", *HALF.split(), "--rank_scale=0.5"])
    assert given.record() == short.record()
    assert given.frobenius_decay == 1e-4
    assert len(given.warnings) == 1
    assert TranslationConfig.parse(["d", "--wd2fd-outval", "--weight_decay", "5e-4"]).frobenius_decay == 5e-4
    silent = TranslationConfig.parse(["d", "--wd2fd-outval", "--weight-decay", "5e-4", "--frobenius-decay", "1e-5"])
    assert (silent.frobenius_decay, silent.warnings) == (1e-5, [])
    command = "d --batch-size 128 --beam 5 --remove-bpe --quiet --path results/checkpoint_best.pt --dump results/bleu.log"
    assert parse_generate([*command.split(), "--rank-scale", "0.5"]).rank_scale == 0.5


def test_flags_that_change_no_result_are_no_part_of_the_configuration():
    plain = TranslationConfig.parse(["d", "--update-freq", "2"]).record()
    noisy = ["d", "--num-workers", "3", "--update-freq", "2", "--log-interval=7", "--no-epoch-checkpoints", "--seed", "5"]
    assert TranslationConfig.parse(noisy).record() == plain
    assert plain["fairseq"] == ["--update-freq 2"]
    assert TranslationConfig.parse(["d", "--ddp-backend", "legacy_ddp", "--update-freq=2"]).record() == plain
    assert TranslationConfig.parse(["d", "--ddp-backend", "slowmo", "--update-freq=2"]).record() != plain
    both = ["--update-freq", "2", "--patience", "3"]
    assert TranslationConfig.parse(["d", *both]).record() == TranslationConfig.parse(["d", *both[2:], *both[:2]]).record()
    assert TranslationConfig.parse(["d", "--update-freq", "4"]).record() != plain


def test_the_286_settings_are_all_here_and_differ():
    rows = [row for table in PROGRAM.tables for row in table.rows]
    assert [len(table.rows) for table in PROGRAM.tables] == [38, 124, 124]
    assert len({PROGRAM.config_hash(row) for row in rows}) == 286
    assert sum("frobenius" in row.id for row in rows) == 2 * 5 * 2 + 2 * 2 + 2 * 5 * 4 * 5
    for row in rows:
        args = TranslationConfig.parse(row.flags)
        assert args.warnings == []
        assert args.frobenius_decay in (0.0, args.weight_decay)


def test_fairseqs_own_parser_reads_every_kind_of_row(data):
    from fairseq import options

    engine.load()
    for row in [table.rows[index] for table in PROGRAM.tables for index in (0, len(table.rows) // 2, -1)]:
        args = TranslationConfig.parse(row.flags)
        read = engine.parse(options.get_training_parser, args.fairseq_words(data))
        for name in (
            "rank_scale",
            "init",
            "spectral_quekey",
            "wd2fd",
            "wd2fd_outval",
            "frobenius_decay",
            "weight_decay",
            "dropout",
        ):
            assert getattr(read, name) == getattr(args, name), name
        assert (read.lr, read.max_update, read.momentum, read.warmup_init_lr) == ([0.25], 100_000, 0.99, 0.25)


def test_a_warm_up_is_passed_on_to_any_scheduler_that_has_one(data):
    from fairseq import options

    engine.load()
    for flags, expected in (
        ("--lr-scheduler cosine --warmup-updates 500 --warmup-init-lr 1e-7", (500, 1e-7)),
        ("--lr-scheduler cosine", (0, -1)),
        ("--lr-scheduler polynomial_decay --total-num-update 9 --warmup-updates 500", (500, None)),
        ("--lr-scheduler fixed --warmup-updates 500", (500, None)),
        ("", (4000, 0.25)),
        ("--warmup-updates 1", (1, 0.25)),
    ):
        args = TranslationConfig.parse([str(data), *flags.split()])
        scheduler = engine.configuration(options.get_training_parser, args.fairseq_words(data)).lr_scheduler
        assert (scheduler.warmup_updates, getattr(scheduler, "warmup_init_lr", None)) == expected


def test_prepare_defaults():
    args = parse_prepare([])
    assert (args.corpus, args.bpe) == ("iwslt14", 25_000)
    assert args.dest == ROOT / "data-bin" / "iwslt14.tokenized.de-en"
