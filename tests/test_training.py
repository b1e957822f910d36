"""The ResNet program end to end: learning, exact resume, parallel training, the normalization experiment."""

import copy
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import FactorizedLinear, FrobeniusDecay, LowRankConfig, factorize_, load_factorized_, param_groups
from common.experiments import checkpoints
from common.experiments.distributed import Processes
from common.experiments.files import ROOT, read_json
from common.experiments.runs import REQUEUE, Run, seed_everything
from common.linalg import frobenius_norm
from common.vision.data import Data, load
from common.vision.training import Trainer
from resnet_cifar.config import ResNetConfig
from resnet_cifar.models import BasicBlock, build, is_factorized
from resnet_cifar.train import learning_rate, main

BASE = "--data digits --arch resnet20 --rank-scale 0.111 --device cpu".split()


@pytest.fixture
def train(capsys):
    """Run the program in this process; returns the directory of its run."""

    def run(*flags, base=BASE):
        main([str(word) for word in (*base, *flags)])
        return Path(capsys.readouterr().out.strip()).parent

    return run


@pytest.fixture
def one_thread():
    """As processes of torchrun compute: sums in another order would differ in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def metrics(directory, *, timeless=True):
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    drop = ("seconds", "images_per_second") if timeless else ()
    return [{key: value for key, value in record.items() if key not in drop} for record in records]


def weights(directory):
    return checkpoints.load(directory / "checkpoint.pt")["model"]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_it_learns_and_records(train, tmp_path):
    run = train("--spectral", "--wd2fd", "--epochs", 3, "--save-dir", tmp_path / "r", "--row", "t/r", "--tensorboard")
    result = read_json(run / "result.json")
    assert (result["status"], result["row"], result["seed"]) == ("finished", "t/r", 0)
    assert result["metrics"]["final"] > 50
    assert result["metrics"]["best"] >= result["metrics"]["final"]
    assert result["parameters"] == {"original": 269_722, "compressed": 63_850, "ratio": 63_850 / 269_722}
    assert {"group": "factors", "tensors": 36, "frobenius_decay": 1e-4} in result["decays"]
    assert result["environment"]["torch"] == torch.__version__
    records = metrics(run)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    names = ["frobenius_norm", "nuclear_norm", "nuclear_norm_bound", "non_orthogonality", "effective_lr"]
    assert all(name in record for name in names for record in records)
    assert records[0]["nuclear_norm"] == pytest.approx(records[0]["nuclear_norm_bound"], rel=1e-4)  # balanced at the start
    assert list(run.glob("events.out.tfevents*"))


def test_same_seed_same_run_and_other_seed_other_run(train, tmp_path):
    first, again, other = (
        train("--epochs", 1, "--seed", seed, "--save-dir", tmp_path / str(i)) for i, seed in enumerate((1, 1, 2))
    )
    assert_same(weights(first), weights(again))
    assert metrics(first) == metrics(again)
    assert not torch.equal(weights(first)["layer1.0.conv1.u"], weights(other)["layer1.0.conv1.u"])


def test_two_steps_change_every_parameter_and_evaluation_none(train, tmp_path):
    seed_everything(0)
    model = build("resnet20", 10)
    factorize_(model, LowRankConfig(0.111, init="kaiming"), filter_fn=is_factorized)
    trained = weights(train("--max-steps", 2, "--save-dir", tmp_path / "r"))
    for name, parameter in model.named_parameters():
        assert not torch.equal(trained[name], parameter), name


@pytest.mark.parametrize("stop", [5, 12, 17])
def test_a_resumed_run_is_the_uninterrupted_run(train, tmp_path, stop):
    """Stopped within the first epoch, at its end, and within the second: weights, metrics and record of norms, bit for bit."""
    flags = ["--wd2fd", "--spectral", "--epochs", 2, "--dump-frobnorms", "--resume", "auto"]
    whole = train(*flags, "--save-dir", tmp_path / "whole")
    parts = train(*flags, "--save-dir", tmp_path / "parts", "--max-steps", stop)
    assert checkpoints.load(parts / "checkpoint.pt")["step"] == stop
    assert read_json(parts / "result.json")["config"]["max_steps"] == stop
    train(*flags, "--save-dir", tmp_path / "parts")
    assert_same(weights(whole), weights(parts))
    assert metrics(whole) == metrics(parts)
    first, second = (read_json(run / "result.json") for run in (whole, parts))
    assert (first["metrics"], first["config_hash"]) == (second["metrics"], second["config_hash"])
    norms = [torch.load(run / "frobnorms.tensor", weights_only=True)["norms"] for run in (whole, parts)]
    assert norms[0].shape == (24, 18)
    assert torch.equal(*norms)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 4), (signal.SIGUSR2, 4), (signal.SIGINT, 4), (signal.SIGTERM, 11)])
def test_a_signal_saves_and_exits_to_be_queued_again(train, tmp_path, monkeypatch, number, at):
    """Within an epoch, and during its last step: then the epoch is evaluated and recorded first."""
    flags = ["--epochs", 2, "--resume", "auto", "--save-dir"]
    whole = train(*flags, tmp_path / "whole")
    batch = Data.train_batch

    def interrupt(self, seed, epoch, step, *args, **kwargs):
        if (epoch, step) == (0, at):
            signal.raise_signal(number)
        return batch(self, seed, epoch, step, *args, **kwargs)

    monkeypatch.setattr(Data, "train_batch", interrupt)
    with pytest.raises(SystemExit) as stop:
        train(*flags, tmp_path / "parts")
    assert stop.value.code == REQUEUE
    assert checkpoints.load(tmp_path / "parts" / "checkpoint.pt")["step"] == at + 1
    assert read_json(tmp_path / "parts" / "status.json")["status"] == "stopped"
    monkeypatch.undo()
    parts = train(*flags, tmp_path / "parts")
    assert_same(weights(whole), weights(parts))
    assert metrics(whole) == metrics(parts)


def test_a_second_interrupt_ends_at_once_and_handlers_are_put_back(train, tmp_path, monkeypatch):
    def interrupt(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Data, "train_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train("--epochs", 2, "--save-dir", tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_resume_auto_falls_back_to_the_previous_checkpoint(train, tmp_path, capsys):
    flags = ["--epochs", 2, "--resume", "auto", "--save-dir"]
    whole = train(*flags, tmp_path / "whole")
    train(*flags, tmp_path / "parts", "--max-steps", 20)
    latest = tmp_path / "parts" / "checkpoint.pt"
    latest.write_bytes(latest.read_bytes()[:1000])
    train(*flags, tmp_path / "parts")
    assert_same(weights(whole), weights(tmp_path / "parts"))
    assert metrics(whole) == metrics(tmp_path / "parts")


def test_other_inputs_are_another_run(train, tmp_path, capsys, image_folder):
    folder = ["--data", "imagefolder", "--data-dir", image_folder, "--arch", "resnet20", "--max-steps", 1]
    run = train("--save-dir", tmp_path / "r", base=folder)
    assert train("--save-dir", tmp_path / "r", "--num-classes", 3, base=folder) == run
    (image_folder / "train" / "ant" / "0.png").rename(image_folder / "train" / "bee" / "8.png")
    with pytest.raises(SystemExit):
        train("--save-dir", tmp_path / "r", base=folder)
    assert "another configuration (inputs" in capsys.readouterr().err


def test_finished_runs_are_skipped(train, tmp_path, capsys):
    run = train("--max-steps", 1, "--save-dir", tmp_path / "r")
    before = (run / "result.json").stat().st_mtime_ns
    assert train("--max-steps", 1, "--save-dir", tmp_path / "r") == run
    assert (run / "result.json").stat().st_mtime_ns == before


def test_evaluate_rebuilds_the_model_from_its_checkpoint_alone(train, tmp_path, capsys):
    run = train("--epochs", 1, "--square", "--densify", "--save-dir", tmp_path / "r")
    result = read_json(run / "result.json")
    assert result["metrics"]["densified"] == pytest.approx(result["metrics"]["final"], abs=0.3)
    capsys.readouterr()
    for name in ("checkpoint.pt", "densified.pt"):
        main(["--data", "digits", "--evaluate", "--resume", str(run / name)])
        evaluated = json.loads(capsys.readouterr().out)
        assert evaluated["accuracy"] == pytest.approx(result["metrics"]["final"], abs=0.3)
    assert weights(run)["layer1.0.conv1.m"].shape == (5, 5)
    main(["--data", "digits", "--evaluate", "--resume", str(run)])
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["metrics"]["final"]
    (run / "checkpoint.pt").rename(run / "checkpoint-previous.pt")
    (run / "checkpoint.pt").write_bytes(b"damaged")
    main(["--data", "digits", "--evaluate", "--resume", "auto", "--save-dir", str(run)])
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["metrics"]["final"]


def test_a_folder_to_resume_from_stands_for_its_newest_checkpoint(train, tmp_path, monkeypatch):
    """Under a home directory, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    train("--epochs", 2, "--max-steps", 3, "--save-dir", tmp_path / "a")
    whole = train("--epochs", 2, "--save-dir", tmp_path / "whole")
    resumed = train("--epochs", 2, "--resume", "~/a", "--save-dir", "~/b")
    assert resumed == tmp_path / "b"
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value)


def test_pretrained_dense_weights_factorized_at_full_rank_keep_their_accuracy(train, tmp_path, capsys):
    dense = train("--epochs", 2, "--save-dir", tmp_path / "dense", base="--data digits --arch resnet20".split())
    state = checkpoints.load(dense / "checkpoint.pt")["model"]
    # As other code saves it: under "state_dict", with the prefix of DataParallel.
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "dense.th")
    model = build("resnet20", 10)
    load_factorized_(model, checkpoints.model_state(checkpoints.load(tmp_path / "dense.th"), tmp_path / "dense.th"))
    factorize_(model, LowRankConfig(2.0), filter_fn=is_factorized)
    torch.save({"model": model.state_dict()}, tmp_path / "full-rank.pt")
    capsys.readouterr()
    main(["--data", "digits", "--arch", "resnet20", "--evaluate", "--resume", str(tmp_path / "full-rank.pt")])
    assert json.loads(capsys.readouterr().out)["accuracy"] == read_json(dense / "result.json")["metrics"]["final"]
    train("--pretrained", tmp_path / "dense.th", "--spectral", "--max-steps", 1, "--save-dir", tmp_path / "low-rank")


def test_normalization_replays_the_recorded_norms(train, tmp_path):
    frob = train("--wd2fd", "--dump-frobnorms", "--max-steps", 6, "--save-dir", tmp_path / "frob")
    record = torch.load(frob / "frobnorms.tensor", weights_only=True)
    assert record["layers"][0] == "layer1.0.conv1"
    for flags in ([], ["--wd2fd"]):  # as in the released code, --no-frob wins over --wd2fd
        name = f"norm{len(flags)}"
        norm = train(
            "--no-frob", *flags, "--normalize", frob / "frobnorms.tensor", "--max-steps", 6, "--save-dir", tmp_path / name
        )
        model = build("resnet20", 10)
        load_factorized_(model, weights(norm))
        reached = torch.stack([frobenius_norm(model.get_submodule(layer).factors()) for layer in record["layers"]])
        torch.testing.assert_close(reached, record["norms"][-1])
        assert read_json(norm / "result.json")["decays"][1] == {"group": "factors", "tensors": 36, "weight_decay": 0.0}


def test_normalization_of_three_factors(train, tmp_path):
    frob = train("--square", "--wd2fd", "--dump-frobnorms", "--max-steps", 3, "--save-dir", tmp_path / "frob")
    flags = ["--square", "--no-frob", "--normalize", frob / "frobnorms.tensor", "--max-steps", 3]
    norm = train(*flags, "--save-dir", tmp_path / "norm")
    model = build("resnet20", 10)
    load_factorized_(model, weights(norm))
    norms = torch.load(frob / "frobnorms.tensor", weights_only=True)["norms"]
    torch.testing.assert_close(frobenius_norm(model.layer3[2].conv2.factors()), norms[-1, -1])


def test_bf16_is_refused_where_the_processor_has_none(refuses, monkeypatch):
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    refuses(main, "--data digits --device cpu --amp bf16", "this processor has no bfloat16 convolutions")


def test_bf16_trains(train, tmp_path, bfloat16):
    run = train("--amp", "bf16", "--wd2fd", "--epochs", 2, "--save-dir", tmp_path / "r")
    assert read_json(run / "result.json")["config"]["amp"] == "bf16"
    assert metrics(run)[-1]["train_loss"] < metrics(run)[1]["train_loss"]
    assert all(value.dtype != torch.bfloat16 for value in weights(run).values())


def test_fp16_adds_the_decay_to_unscaled_gradients(tmp_path):
    """The program refuses fp16 on a CPU, whose convolutions lack it; a linear model shows that the scaling is right."""
    updates = []
    for amp in ("off", "fp16"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), FactorizedLinear(192, 10, 4))
        decay = FrobeniusDecay(model, 0.1)
        config = ResNetConfig(data="digits", max_steps=1, amp=amp)
        run = Run(tmp_path / amp, {}, 0)
        run.begin()
        optimizer = torch.optim.SGD(param_groups(model, weight_decay=0.0, decay=decay), lr=0.1)
        trainer = Trainer(
            model,
            load("digits", None),
            run,
            config=config,
            processes=Processes(torch.device("cpu")),
            architecture={},
            optimizer=optimizer,
            schedule=lambda epoch: 0.1,
            decay=decay,
        )
        if amp == "fp16":
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # the default would overflow the first step
        before = model[1].u.detach().clone()
        trainer.fit()
        updates.append(model[1].u.detach() - before)
        assert trainer.scaler.get_scale() == (256 if amp == "fp16" else 1)
    torch.testing.assert_close(updates[1], updates[0], rtol=2e-2, atol=2e-4)


def test_no_step_waits_for_the_device(train, tmp_path):
    """Numbers are read from the device as often in an epoch of 6 steps as in one of 23: never for the sake of a step."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "_local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    counts = []
    for batch in (64, 256):
        with Reads() as reads:
            train("--wd2fd", "--epochs", 1, "--batch-size", batch, "--save-dir", tmp_path / str(batch))
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_compiled_training_agrees_with_eager(train, tmp_path, monkeypatch):
    """The whole program with the compiler's front end; what the back end generates is tested on a block."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    runs = [
        train("--wd2fd", "--max-steps", 1, *flags, "--save-dir", tmp_path / str(len(flags))) for flags in ([], ["--compile"])
    ]
    for name, value in weights(runs[0]).items():
        torch.testing.assert_close(weights(runs[1])[name], value, rtol=1e-3, atol=1e-3)


def test_a_compiled_block_equals_the_eager_one():
    torch.manual_seed(0)
    block = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 8, 2)).double()
    factorize_(block, LowRankConfig(0.5), filter_fn=lambda module, name: isinstance(module, nn.Conv2d))
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for module in (block, compiled):
        module(x).square().sum().backward()
    for mine, other in zip(block.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_learning_rates():
    """A tenth at 100 and 150 of 200 epochs; deep networks warm up for one epoch."""
    shallow, deep = ResNetConfig.parse(["--arch", "resnet32"]), ResNetConfig.parse(["--arch", "resnet56"])
    expected = {0: 0.1, 1: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 199: 0.001}
    for epoch, rate in expected.items():
        assert learning_rate(shallow, epoch) == pytest.approx(rate)
        assert learning_rate(deep, epoch) == pytest.approx(0.01 if epoch == 0 else rate)


def test_two_processes_equal_one_that_averages_their_gradients(tmp_path, one_thread):
    """torchrun with two gloo processes against one that averages the gradients of the same two half-batches."""
    steps, flags = 3, ["--spectral", "--wd2fd", "--max-steps", "3", "--seed", "4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(ROOT / "resnet_cifar" / "train.py"), *BASE, *flags, "--save-dir", str(tmp_path / "r")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "r" / "result.json")
    assert result["environment"]["processes"] == 2

    seed_everything(4)
    model = build("resnet20", 10)
    factorize_(model, LowRankConfig(0.111), filter_fn=is_factorized)
    decay = FrobeniusDecay(model, 1e-4)
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=1e-4, decay=decay), lr=0.1, momentum=0.9)
    data = load("digits", None)
    model.train()
    for step in range(steps):
        replicas = [model, copy.deepcopy(model)]  # the main process's running statistics are the model's
        for rank, replica in enumerate(replicas):
            batch = data.train_batch(4, 0, step, 128, rank=rank, world_size=2)
            assert len(batch.labels) == 64
            replica.zero_grad()
            F.cross_entropy(replica(batch.images), batch.labels).backward()
        for mine, other in zip(*(replica.parameters() for replica in replicas), strict=True):
            mine.grad = (mine.grad + other.grad) / 2
        decay.step()
        optimizer.step()
    assert_same(dict(model.state_dict()), weights(tmp_path / "r"))


def test_real_images_train(train, tmp_path, cifar_jpeg):
    flags = f"--data imagefolder --data-dir {cifar_jpeg} --arch resnet20 --rank-scale 0.111 --spectral --wd2fd".split()
    run = train("--epochs", 1, "--save-dir", tmp_path / "r", base=flags)
    assert read_json(run / "result.json")["metrics"]["final"] >= 5
