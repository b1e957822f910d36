"""What docs/reliability.md promises: killed runs, full disks, damaged files, numbers that are not finite, hostile input."""

import importlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from common import FactorizedLinear, linalg
from common.experiments import checkpoints, training
from common.experiments.distributed import Processes
from common.experiments.files import ROOT, read_json
from common.experiments.runs import Run
from common.vision.data import load
from common.vision.training import Trainer
from resnet_cifar.config import ResNetConfig
from resnet_cifar.train import main as resnet

DIGITS = "--data digits --device cpu --batch-size 256 --save-every 1 --resume auto"
SMALL = f"--network resnet --depth 8 --width 32 --image-size 8 {DIGITS} --lr 0.05"
RESNET = f"--arch resnet20 --rank-scale 0.111 --spectral --wd2fd --dump-frobnorms {DIGITS} --epochs 3"
TINY = "--embed-dim 16 --ffn-dim 24 --layers 1 --heads 2 --max-tokens 400 --cpu --num-workers 0"
HALF = "--rank-scale 0.5 --spectral --spectral-quekey --spectral-outval --wd2fd --wd2fd-quekey --wd2fd-outval"
PROGRAMS = {
    "resnet_cifar.train": RESNET,
    "compression_baselines.train": f"{SMALL} --target-ratio 0.5 --spectral --wd2fd --epochs 3",
    "compression_baselines.sparse": f"{SMALL} --method rigl --target-ratio 0.3 --epochs 3",
    "compression_baselines.prune": f"{SMALL} --method eigendamage --pretrained {{dense}} --target-ratio 0.5 --rounds 2 "
    "--fisher-samples 64 --epochs 2",
    "tensor_wrn.train": f"digits teacher --conv TensorTrain_0.5 --wrn-depth 10 --wrn-width 1 --wd2fd {DIGITS} --epochs 3",
    "transformer_iwslt.train": f"{{data}} {TINY} {HALF} --max-update 24 --patience 9 --no-epoch-checkpoints",
    "bert_pretraining.train": "{text} --layers 1 --embed-dim 16 --heads 2 --seq 16 --batch-size 32 --steps 30 --epoch-steps 10 "
    "--device cpu --resume auto --rank-scale 0.5 --spectral-quekey --spectral-outval --wd2fd-quekey --wd2fd-outval "
    "--dropout 0.1",
}


# The image programs share their loop: without --slow, one of them stands for all.
SLOW = ("compression_baselines.train", "compression_baselines.sparse", "compression_baselines.prune", "tensor_wrn.train")
SOME = [pytest.param(program, marks=[pytest.mark.slow] * (program in SLOW)) for program in PROGRAMS]


@pytest.fixture(scope="module")
def command(tmp_path_factory, forks):
    """The words of a program, with what it needs made before: prepared sentences, or a dense network to prune."""
    folder = tmp_path_factory.mktemp("inputs")
    made = {}

    def words(program, directory):
        if program.startswith("transformer") and "data" not in made:
            pytest.importorskip("fairseq")
            made["data"] = folder / "numbers"
            prepare = f"--corpus numbers --size 400 --bpe 120 --dest {made['data']}".split()
            assert forks("transformer_iwslt.prepare", prepare)[0] == 0, forks.log.read_text()
        if program.startswith("bert") and "text" not in made:
            made["text"] = folder / "text"
            prepare = f"--corpus numbers --lines 2000 --dest {made['text']}".split()
            assert forks("bert_pretraining.prepare", prepare)[0] == 0, forks.log.read_text()
        if program.endswith("prune") and "dense" not in made:
            made["dense"] = folder / "dense" / "checkpoint.pt"
            dense = f"{SMALL} --epochs 2 --save-dir {folder / 'dense'}".split()
            assert forks("compression_baselines.train", dense)[0] == 0, forks.log.read_text()
        return [*PROGRAMS[program].format_map(made).split(), "--save-dir", str(directory)]

    return words


def outcome(directory):
    """All that a run leaves but times: weights, optimizer, records of epochs and of norms, result."""
    timing = ("seconds", "images_per_second", "tokens_per_second", "wps", "ups", "valid_wps")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {"metrics": [{key: value for key, value in line.items() if key not in timing} for line in lines]}
    if (directory / "checkpoint_last.pt").exists():
        from transformer_iwslt import engine

        for name in (engine.LAST, engine.BEST):
            state = engine.load_checkpoint(directory / name)
            found[name] = {"model": state["model"], "optimizer": state["last_optimizer_state"]}
        found["result"] = read_json(directory / "trained.json")
        return found
    state = checkpoints.load(directory / checkpoints.LATEST)
    found["state"] = {key: state[key] for key in ("model", "optimizer", "step", "best", "final", "random", "hook")}
    result = read_json(directory / "result.json")
    found["result"] = {key: value for key, value in result.items() if key not in ("seconds", "environment")}
    if (directory / "frobnorms.tensor").exists():
        found["norms"] = torch.load(directory / "frobnorms.tensor", weights_only=True)
    return found


def differing(one, other, path=""):
    """Names of the values that two nested outcomes differ in, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [name for key in one.keys() | other.keys() for name in differing(one.get(key), other.get(key), f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [name for index, pair in enumerate(zip(one, other, strict=True)) for name in differing(*pair, f"{path}/{index}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    return [] if one == other else [path]


CHECKPOINTS = (checkpoints.LATEST, checkpoints.PREVIOUS, "checkpoint_last.pt")


def has_checkpoint(directory):
    return any((directory / name).exists() for name in CHECKPOINTS)


@pytest.fixture(scope="module")
def whole(forks, command, tmp_path_factory):
    """What an uninterrupted run of a program leaves, and the seconds it takes; each is made once."""
    made = {}

    def run(program):
        if program not in made:
            directory = tmp_path_factory.mktemp("whole")
            status, seconds = forks(program, command(program, directory))
            assert status == 0, forks.log.read_text()
            made[program] = outcome(directory), seconds
            assert differing(made[program][0], outcome(directory)) == []
        return made[program]

    return run


def kill_and_go_on(forks, command, whole, program, tmp_path, kills, seed):
    """Kill a run at ``kills`` random moments, some in a row before it may finish, and compare each finished one.

    Half of the moments are times, half are writes to the disk, and at least half come after a first checkpoint. Returns how
    many there were, and how many of those.
    """
    chance = random.Random(seed)
    expected, seconds = whole(program)
    done = late = finished = 0
    while done < kills or late < kills / 2:
        directory = tmp_path / f"killed{finished}"
        for _ in range(chance.randint(1, 4)):
            moment = {"at": chance.randint(1, 50)} if chance.random() < 0.5 else {"after": chance.uniform(0.4, 1) * seconds}
            status, _ = forks(program, command(program, directory), **moment)
            assert status in (-9, 0), forks.log.read_text()
            if status == 0:  # it was done before
                break
            done += 1
            late += has_checkpoint(directory)
        status, _ = forks(program, command(program, directory))
        assert status == 0, forks.log.read_text()
        assert differing(expected, outcome(directory)) == [], f"{program}, killed {done} times"
        assert not [path for path in directory.glob("*.tmp") if "checkpoint" in path.name]
        finished += 1
    return done, late


@pytest.mark.parametrize("program", SOME)
def test_a_killed_run_goes_on_to_the_same_end(forks, command, whole, program, tmp_path):
    kill_and_go_on(forks, command, whole, program, tmp_path, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_forty_kills_of_each_program(forks, command, whole, program, tmp_path):
    done, late = kill_and_go_on(forks, command, whole, program, tmp_path, kills=40, seed=1)
    print(f"{program}: {done} kills survived of {done}, {late} of them after a first checkpoint")


# Disks


@pytest.mark.parametrize("program", SOME)
def test_a_full_disk_ends_in_one_line_and_keeps_what_was_there(forks, command, whole, program, tmp_path):
    """A file-size limit stands in for a full disk: a checkpoint is above it, and what is written before is below."""
    words = command(program, tmp_path)
    for write in range(14, 60, 6):  # a run that was killed once it had a checkpoint
        forks(program, words, at=write)
        if has_checkpoint(tmp_path):
            break
    latest = next(path for path in map(tmp_path.joinpath, CHECKPOINTS) if path.exists())
    before = latest.read_bytes()
    limit = 60_000 if program.startswith("transformer") else 15_000
    assert forks(program, words, limit=limit)[0] == 2, forks.log.read_text()
    (line,) = [line for line in forks.log.read_text().splitlines() if "error" in line]
    assert "File too large" in line
    assert latest.read_bytes() == before
    assert "File too large" in read_json(tmp_path / "status.json")["error"]
    assert not list(tmp_path.glob("*.tmp"))
    assert forks(program, words)[0] == 0
    assert differing(whole(program)[0], outcome(tmp_path)) == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_directory_that_cannot_be_written_is_one_line(forks, command, program):
    assert forks(program, command(program, "/proc/run"))[0] == 2
    (line,) = [line for line in forks.log.read_text().splitlines() if "error" in line]
    assert "/proc/run" in line


def test_any_flipped_bit_is_found_or_harmless(tmp_path):
    """A checkpoint with one byte changed, anywhere, is refused or holds what it held."""
    state = {"model": {"weight": torch.arange(500.0), "bias": torch.ones(3)}, "step": 7, "config": {"lr": 0.1}}
    checkpoints.save_file(tmp_path / "whole.pt", state)
    content = (tmp_path / "whole.pt").read_bytes()
    refused = 0
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            held = checkpoints.load(tmp_path / "damaged.pt")
        except ValueError:
            refused += 1
        else:
            assert differing(state, held) == [], f"byte {place} of {len(content)}"
    assert refused > len(content) / 7 / 2
    for length in range(0, len(content), 101):
        (tmp_path / "damaged.pt").write_bytes(content[:length])
        with pytest.raises(ValueError, match="it is damaged"):
            checkpoints.load(tmp_path / "damaged.pt")


def test_checkpoints_of_old_torch_are_read(tmp_path):
    """Before 1.6 it wrote no zip, and so no checksums."""
    state = {"model": {"weight": torch.arange(3.0)}}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert differing(state, checkpoints.load(tmp_path / "old.pt")) == []


def test_a_damaged_checkpoint_gives_way_to_the_one_before(forks, command, whole, tmp_path):
    words = command("resnet_cifar.train", tmp_path / "run")
    for steps in (5, 9):
        assert forks("resnet_cifar.train", [*words, "--max-steps", str(steps)])[0] == 0
    latest = tmp_path / "run" / "checkpoint.pt"
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    assert forks("resnet_cifar.train", words)[0] == 0
    assert "it is damaged; looking for an older checkpoint" in forks.log.read_text()
    assert differing(whole("resnet_cifar.train")[0], outcome(tmp_path / "run")) == []


def test_two_processes_cannot_share_a_directory(tmp_path):
    run = Run(tmp_path / "run", {"lr": 0.1}, 0, resume=True)
    run.begin()
    with pytest.raises(ValueError, match="in use by another process"):
        Run(tmp_path / "run", {"lr": 0.1}, 0, resume=True).begin()


def test_a_clock_that_jumps_back_does_not_silence_the_heartbeat(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", {}, 0)
    run.begin()
    monkeypatch.setattr("time.time", lambda: 1000.0)
    monkeypatch.setattr("time.monotonic", lambda: 1e9)
    run.heartbeat({"step": 5})
    assert read_json(tmp_path / "run" / "status.json") == {
        "status": "running", "time": 1000.0, "row": None, "seed": 0, "step": 5
    }  # fmt: skip


def test_what_a_killed_process_left_half_written_is_cleaned_up(tmp_path):
    (tmp_path / ".checkpoint.pt.123.tmp").write_bytes(b"half")
    Run(tmp_path, {}, 0).begin()
    assert not list(tmp_path.glob(".*.tmp"))


# Numbers


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("resnet_cifar.train", "--lr 1e30"),
        ("compression_baselines.train", "--lr 1e30"),
        ("compression_baselines.sparse", "--lr 1e30"),
        ("compression_baselines.sparse", "--lr 1e30 --method magnitude --distribution global --update-every 5"),
        ("compression_baselines.prune", "--lr 1e30"),
        ("tensor_wrn.train", "--lr 1e30"),
    ],
)
def test_a_run_that_diverges_stops_and_says_where(forks, command, program, flags, tmp_path):
    status, _ = forks(program, [*command(program, tmp_path / "run"), *flags.split()])
    assert status == 2, forks.log.read_text()
    (line,) = [line for line in forks.log.read_text().splitlines() if "error" in line]
    assert "not finite at step" in line
    assert "lower --lr" in line
    assert read_json(tmp_path / "run" / "status.json")["status"] == "failed"
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(("step", "noticed"), [(7, 8), (8, 8), (11, 12)])
def test_numbers_that_fail_later_leave_the_last_good_checkpoint(tmp_path, monkeypatch, capsys, step, noticed):
    """Of six steps an epoch, looking every fourth and at the end of each: the step, the layer and the checkpoint are named."""
    made = Trainer.train_step

    def poison(self, batch):
        if self.step + 1 == step:
            self.model.layer2[0].conv1.u.data[0, 0] = float("nan")
        assert self.step < noticed
        made(self, batch)

    monkeypatch.setattr(Trainer, "train_step", poison)
    monkeypatch.setattr(training, "_CHECK_EVERY", 4)
    with pytest.raises(SystemExit) as stop:
        resnet([*RESNET.split(), "--save-dir", str(tmp_path)])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    kept = f"the last good checkpoint is {tmp_path}/checkpoint.pt at step 6"
    assert f"error: the loss is not finite at step {step}, and " in said
    assert kept in said
    assert "not finite at step" in read_json(tmp_path / "status.json")["error"]
    state = checkpoints.load(tmp_path / "checkpoint.pt")
    assert state["step"] == 6
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_translation_that_diverges_stops_and_says_where(forks, command, tmp_path):
    words = [*command("transformer_iwslt.train", tmp_path / "run"), "--lr", "1e30", "--clip-norm", "0"]
    assert forks("transformer_iwslt.train", words)[0] == 2, forks.log.read_text()
    (line,) = [line for line in forks.log.read_text().splitlines() if "error" in line]
    assert "not finite at update " in line
    assert "not finite at update " in read_json(tmp_path / "run" / "status.json")["error"]


def test_denormal_numbers_do_not_slow_a_run_down():
    """They are flushed to zero, in every thread: arithmetic on them takes up to a hundred times as long."""
    product = "(torch.full((2**22,), 1e-38) * 1e-3).max()"
    code = f"import torch; from common.experiments import distributed; distributed.start('cpu'); print({product})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "tensor(0.)\n"


def test_an_overflow_of_fp16_goes_on(tmp_path):
    """At a scale that overflows, the scaler skips the step and halves the scale; the run does not end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), FactorizedLinear(192, 10, 4))
    config = ResNetConfig(data="digits", max_steps=3, amp="fp16")
    run = Run(tmp_path / "run", {}, 0)
    run.begin()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, load("digits", None), run, config=config, processes=Processes(torch.device("cpu")), architecture={},
        optimizer=optimizer, schedule=lambda epoch: 0.1,
    )  # fmt: skip
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = model[1].u.detach().clone()
    trainer.fit()
    assert trainer.scaler.get_scale() == 2.0**37
    assert torch.equal(model[1].u, before)


def test_an_svd_that_fails_is_taken_in_float64(monkeypatch):
    svd = torch.linalg.svd

    def fail(matrix, **options):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return svd(matrix, **options)

    matrix = torch.randn(6, 4)
    u, vt = linalg.spectral_init(matrix, 2)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.warns(UserWarning, match=r"the SVD of a \(6, 4\) matrix failed and is redone in float64"):
        again = linalg.spectral_init(matrix, 2)
    torch.testing.assert_close(again[0] @ again[1], u @ vt)


@pytest.mark.parametrize("size", [0.0, 1.2e-38, 1e-30, 1e-3, 1e15])
@pytest.mark.parametrize("depth", [2, 3])
def test_norms_are_replayed_onto_factors_of_any_size(size, depth):
    shapes = [(5, 3), (3, 4)] if depth == 2 else [(5, 3), (3, 3), (3, 4)]
    factors = [torch.full(shape, size) for shape in shapes]
    scaled = linalg.rescale(factors, 2.0)
    assert all(factor.isfinite().all() for factor in scaled)
    norm = linalg.frobenius_norm([factor.double() for factor in scaled])
    assert norm == pytest.approx(2.0 if size else 0.0, rel=1e-5)


# Files


DENSE = "--network resnet --depth 8 --data digits"


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("resnet_cifar.train", "--data digits --evaluate --resume {}"),
        ("resnet_cifar.train", "--data digits --rank-scale 0.1 --pretrained {}"),
        ("resnet_cifar.train", "--data digits --rank-scale 0.1 --normalize {}"),
        ("compression_baselines.prune", f"{DENSE} --method eigendamage --target-ratio 0.5 --pretrained {{}}"),
        ("compression_baselines.sparse", f"{DENSE} --method rigl --target-ratio 0.5 --evaluate --resume {{}}"),
        ("tensor_wrn.train", "digits student --teacher {}"),
    ],
)  # fmt: skip
def test_no_file_can_run_code(program, command, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "layers": [], "norms": Hostile()}, "hostile.pt")
    refuses(importlib.import_module(program).main, command.format("hostile.pt"), "hostile.pt")
    assert not Path("pwned").exists()


def test_archives_cannot_write_elsewhere(tmp_path, monkeypatch):
    """Absolute paths, parent folders and links, in the archive of images and in that of sentences."""
    from torchvision.datasets import utils

    from common.vision import tiny_imagenet
    from transformer_iwslt import corpora

    places = [tmp_path / "inside", tmp_path / "outside"]
    for place in places:
        place.mkdir()
    archive = tmp_path / "hostile.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in ("../../outside/one", f"{places[1]}/two", "tiny-imagenet-200/train/n0/a.JPEG"):
            packed.writestr(name, b"content")
        link = zipfile.ZipInfo("tiny-imagenet-200/link")
        link.external_attr = 0o120777 << 16
        packed.writestr(link, str(places[1]))
        packed.writestr("tiny-imagenet-200/link/three", b"content")
    monkeypatch.setattr(
        utils, "download_url", lambda url, root, md5: shutil.copy(archive, Path(root) / "tiny-imagenet-200.zip")
    )
    with pytest.raises((ValueError, OSError)):
        tiny_imagenet.prepare(places[0])
    assert list(places[1].iterdir()) == []

    with tarfile.open(places[0] / "de-en.tgz", "w:gz") as packed:
        for name, kind in (("../outside/one", tarfile.REGTYPE), ("train.tags.de-en.de", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            packed.addfile(member, io.BytesIO())
    with pytest.raises(ValueError, match=r"lacks train\.tags\.de-en\.de"):
        corpora.iwslt14(places[0])
    assert list(places[1].iterdir()) == []


FORMAT_1 = Path(__file__).with_name("format1.pt")


def test_a_checkpoint_of_format_1_is_read(capsys):
    """A file that stays as it was written: whoever changes the format keeps reading it, with the accuracy it had."""
    resnet("--data digits --device cpu --evaluate --resume".split() + [str(FORMAT_1)])
    held = checkpoints.load(FORMAT_1)
    assert held["format"] == 1
    measured = json.loads(capsys.readouterr().out)
    assert measured["accuracy"] == pytest.approx(held["final"]["accuracy"], abs=0.3)  # an image may be on the edge
    assert measured["loss"] == pytest.approx(held["final"]["loss"], rel=1e-3)
