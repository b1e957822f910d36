"""python -m common.tables run: rows in this process and in workers, their order, failures and stops."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from common.experiments import checkpoints, runs
from common.experiments.files import ROOT, read_json, write_json
from common.experiments.runs import REQUEUE
from common.tables import run
from common.tables.__main__ import main
from common.tables.archive import pack, unpack
from common.tables.rows import programs

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RESNET = "resnet_cifar/train.py --data digits --arch resnet20 --batch-size 32 --max-steps 3"
COMPRESSION = "--data digits --image-size 8 --network resnet --depth 8 --width 32 --batch-size 32 --max-steps 3"
PRUNE = "--method eigendamage --target-ratio 0.3 --fisher-samples 64 --pretrained {after}/checkpoint.pt"
TENSOR = "tensor_wrn/train.py digits teacher --wrn-depth 10 --wrn-width 1 --max-steps 3"
# Two rows of each image program. Commands by name; of several, the last one's run is compared.
RUNS = {
    "resnet": [f"{RESNET} --rank-scale 0.1 --spectral --wd2fd"],
    "resnet-deep": [f"{RESNET} --rank-scale 0.5 --square --wd2fd --residual 0.1"],
    "tensor": [f"{TENSOR} --conv TensorTrain_0.3"],
    "tensor-low-rank": [f"{TENSOR} --target-ratio 0.3 --init norm-matched --wd2fd"],
    "low-rank": [f"compression_baselines/train.py {COMPRESSION} --target-ratio 0.3"],
    "low-rank-both": [f"compression_baselines/train.py {COMPRESSION} --target-ratio 0.5 --spectral --wd2fd"],
    "sparse": [f"compression_baselines/sparse.py {COMPRESSION} --method snip --target-ratio 0.2 --score-batches 2"],
    "sparse-rigl": [f"compression_baselines/sparse.py {COMPRESSION} --method rigl --target-ratio 0.2 --update-every 1"],
    "pruned": [
        f"compression_baselines/train.py {COMPRESSION}",
        f"compression_baselines/prune.py {COMPRESSION} {PRUNE}",
    ],
    "pruned-channels": [
        f"compression_baselines/train.py {COMPRESSION} --lr 0.05",
        f"compression_baselines/prune.py {COMPRESSION} {PRUNE.replace('eigendamage', 'kron-obd')}",
    ],
}


def task_of(name, directory, seed=1, runs=RUNS):
    lines = runs[name]
    folders = [directory / name / str(number) for number in range(len(lines))]
    commands = [(*line.split(), "--save-dir", str(folder)) for line, folder in zip(lines, folders, strict=True)]
    return run.task_of_commands(f"test/{name}", commands, seed, []), folders[-1]


def weights(folder):
    return checkpoints.load(folder / "checkpoint.pt")["model"]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_runs_of_one_worker_equal_those_of_processes_of_their_own(forks, tmp_path, monkeypatch):
    """Two rows of each program, one after the other in one worker: weights and metrics bit for bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    rows = {name: task_of(name, tmp_path / "worker") for name in RUNS}
    outcomes = list(run._in_workers([task for task, _ in rows.values()], 1, ()))
    assert [outcome.status for _, outcome in outcomes] == [0] * len(RUNS)
    assert [outcome.printed for _, outcome in outcomes] == [f"{folder / 'result.json'}\n" for _, folder in rows.values()]
    for name, (task, folder) in rows.items():
        apart = ""
        for words in task.commands:
            words = [word.replace("{after}", apart).replace("/worker/", "/apart/") for word in words]
            assert forks(words[0].removesuffix(".py").replace("/", "."), words[1:])[0] == 0, forks.log.read_text()
            apart = forks.log.read_text().splitlines()[-1].removesuffix("/result.json")
        assert Path(apart).relative_to(tmp_path / "apart") == folder.relative_to(tmp_path / "worker")
        expected, found = weights(Path(apart)), weights(folder)
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == [], name
        assert read_json(Path(apart) / "result.json")["metrics"] == read_json(folder / "result.json")["metrics"]
    log = (tmp_path / "logs" / "test" / "resnet-seed1.txt").read_text()
    assert "decay: {" in log


def test_a_process_that_ran_a_row_is_left_as_it_was(tmp_path, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)]
    task, folder = task_of("resnet", tmp_path)
    assert run.run([task]) == 0
    assert capsys.readouterr().out == f"{folder}/result.json\n"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)] == handlers
    assert (torch.tensor(2e-39) / 2).item() > 0  # denormal numbers count
    assert torch.get_default_dtype() == torch.float32
    assert run.run([task]) == 0
    output = capsys.readouterr()
    assert output.out == f"{folder}/result.json\n"
    assert "nothing to do" in output.err


def test_rows_are_named_by_table_and_pattern():
    everything = [*programs(), *programs("evidence")]

    def names(*rows, seeds=None):
        return [task.name for task in run.tasks_of(everything, rows, seeds, ["--epochs", "9"])]

    assert names("quickstart/full") == [f"quickstart/full seed {seed}" for seed in (1, 2, 3)]
    assert names("quickstart/full", "quickstart/f*", seeds=[4]) == ["quickstart/full seed 4", "quickstart/frobenius seed 4"]
    assert names("evidence-schemes/full", seeds=[1]) == ["evidence-schemes/full seed 1"]
    # Rows that others run before their own are left out of a table and may be asked for.
    assert len(names("normalization", seeds=[1])) == 4
    assert len(names("normalization/*-frobenius", seeds=[1])) == 2
    (task,) = run.tasks_of(everything, ["normalization/*-regular-normalized"], [2], ["--epochs", "9"])
    first, second = task.commands
    assert "--dump-frobnorms" in first
    assert "{after}/frobnorms.tensor" in second
    assert first[-4:] == second[-4:] == ("--seed", "2", "--epochs", "9")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run nothing", "there is no table 'nothing': there are "),
        ("run quickstart/nothing", "no row in table quickstart matches 'nothing'"),
        ("run quickstart --seeds x", "argument --seeds: invalid natural value: 'x'"),
        ("run quickstart --jobs 0", "must be at least 1"),
        ("run quickstart/full --seeds 1 -- --epochs many", "argument --epochs/--epoch: invalid positive_int value: 'many'"),
        ("run a/b --command resnet_cifar/train.py", "--command needs exactly one TABLE/ROW, and --seeds"),
        ("run a/b --seeds 1 --command nothing.py", "a command must begin with a program, got 'nothing.py': there are "),
        ("run a/b --seeds 1 --command ''", "a command must begin with a program, got"),
        (
            "run a/../b --seeds 1 --command resnet_cifar/train.py",
            "--command needs one row such as quickstart/full, got 'a/../b'",
        ),
        ("run a/b --seeds 1 --command {after}/train.py", "{after} in the first --command stands for nothing"),
        ("run quickstart/full --launcher nowhere", "starts with 'nowhere', which is not a program on PATH: give its path"),
        ("run quickstart/full --launcher 'x", "cannot be split into words: No closing quotation"),
        ("run quickstart/full --seeds 1 2 -- --seed 3", "--seed cannot be given to the program: run sets it"),
        ("run quickstart/full --seeds 1 2 -- --save-dir x", "--save-dir names the folder of a single run"),
        ("list -- --epochs 1", "flags after -- are only for run and submit, got --epochs 1"),
    ],
)
def test_what_cannot_be_run_is_one_line_before_any_run_starts(refuses, command, message):
    refuses(main, command, message)


def stand_in(path, code):
    """A program that is started in place of Python and the real one; ``$seed`` is the run's."""
    path.write_text(f'#!/usr/bin/env bash\nseed=$(grep -o -- "--seed [0-9]*" <<<"$*"); seed=${{seed##* }}\n{code}\n')
    path.chmod(0o755)
    return [str(path)]


def quick_tasks(*seeds):
    return [run.task_of_commands("t/r", [tuple(RESNET.split())], seed, []) for seed in seeds]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_leaves_the_others_alone(tmp_path, monkeypatch, capsys, jobs):
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    launcher = stand_in(tmp_path / "x", '[[ $seed != 2 ]] || { echo "no such luck" >&2; exit 3; }; echo "/$seed/result.json"')
    assert run.run(quick_tasks(1, 2, 3), jobs, launcher) == 3
    output = capsys.readouterr()
    assert sorted(output.out.splitlines()) == ["/1/result.json", "/3/result.json"]
    (failed,) = [line for line in output.err.splitlines() if line.startswith("failed: ")]
    log = tmp_path / "logs" / "t" / "r-seed2.txt"
    assert failed == "failed: t/r seed 2: failed with status 3" + (f"; see {log}" if jobs > 1 else "")
    if jobs > 1:
        assert "no such luck" in log.read_text()


def test_a_log_that_cannot_be_written_fails_its_own_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    (tmp_path / "logs" / "t" / "r-seed2.txt").mkdir(parents=True)
    assert run.run(quick_tasks(1, 2, 3, 4), 2, stand_in(tmp_path / "x", 'echo "/$seed/result.json"')) == 1
    output = capsys.readouterr()
    assert sorted(output.out.splitlines()) == ["/1/result.json", "/3/result.json", "/4/result.json"]
    assert "failed: t/r seed 2: failed with status 1" in output.err


def test_failures_of_several_kinds_end_with_status_1(tmp_path, capsys):
    assert run.run(quick_tasks(2, 3), 1, stand_in(tmp_path / "x", "exit $seed")) == 1
    assert capsys.readouterr().out == ""


def test_a_worker_that_dies_takes_only_its_own_run_along(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    launcher = stand_in(tmp_path / "x", '[[ $seed != 2 ]] || kill -9 $PPID; sleep 0.2; echo "/$seed/result.json"')
    assert run.run(quick_tasks(1, 2, 3, 4), 2, launcher) == run.KILLED
    output = capsys.readouterr()
    assert sorted(output.out.splitlines()) == [f"/{seed}/result.json" for seed in (1, 3, 4)]
    (failed,) = [line for line in output.err.splitlines() if line.startswith("failed: ")]
    assert failed.startswith("failed: t/r seed 2: its process died: killed, or out of memory; see ")


def test_workers_share_out_the_gpus_and_replace_one_that_died_on_its_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    code = f'echo "$CUDA_VISIBLE_DEVICES" >{tmp_path}/$seed; [[ $seed != 2 ]] || kill -9 $PPID; while '
    code += (
        f"(( $(cat {tmp_path}/[1-4] | wc -l) < 3 )); do sleep 0.1; done; echo /$seed"  # the first keeps its worker till then
    )
    outcomes = run._in_workers(quick_tasks(1, 2, 3), 2, stand_in(tmp_path / "x", code), ["GPU-aa", "GPU-bb"])
    assert {task.seed: outcome.status for task, outcome in outcomes} == {1: 0, 2: run.KILLED, 3: 0}
    assert [(tmp_path / str(seed)).read_text() for seed in (1, 2, 3)] == ["GPU-aa\n", "GPU-bb\n", "GPU-bb\n"]


@pytest.mark.parametrize(
    ("gpus", "words", "launcher", "given"),
    [
        (["GPU-aa", "GPU-bb"], "", (), ["GPU-aa", "GPU-bb"]),
        (["GPU-aa"], "", (), ()),
        (["GPU-aa", "GPU-bb"], "--device cuda:1", (), ()),
        (["GPU-aa", "GPU-bb"], "--device cpu", (), ()),
        (["GPU-aa", "GPU-bb"], "", ("env",), ()),
    ],
)
def test_only_runs_that_may_take_any_of_several_gpus_are_given_one(monkeypatch, gpus, words, launcher, given):
    monkeypatch.setattr(run, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(run, "shared_gpus", contextlib.nullcontext)
    asked = []
    monkeypatch.setattr(run, "_in_workers", lambda tasks, jobs, launcher, gpus: asked.append(gpus) or iter(()))
    tasks = [run.task_of_commands("t/r", [(*RESNET.split(), *words.split())], seed, []) for seed in (1, 2)]
    run.run(tasks, 2, launcher)
    assert [list(each) for each in asked] == [list(given)]


def test_a_prerequisite_that_prints_nothing_fails_the_row(tmp_path, capsys):
    task, _ = task_of("pruned", tmp_path)
    assert run.run([task], 1, stand_in(tmp_path / "x", "exit 0")) == 1


def start(tmp_path, tasks, jobs, launcher=()):
    """A process that runs the tasks as ``run`` does."""
    code = f"""
import pathlib, sys
from common.tables import run
from common.tables.run import Task
run.LOGS = pathlib.Path({str(tmp_path / "logs")!r})
sys.exit(run.run({tasks!r}, {jobs}, {list(launcher)!r}))
"""
    return subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("jobs", [1, 2])
def test_signals_reach_the_programs_and_no_other_run_starts(tmp_path, number, jobs):
    code = f'trap "touch {tmp_path}/saved$seed; exit 75" TERM; touch {tmp_path}/began$seed; while true; do sleep 0.1; done'
    process = start(tmp_path, quick_tasks(1, 2, 3), jobs, stand_in(tmp_path / "x", code))
    began = [tmp_path / f"began{seed}" for seed in range(1, jobs + 1)]
    wait_for(lambda: all(path.exists() for path in began))
    process.send_signal(number)
    assert process.communicate()[0] == b""
    assert process.returncode == REQUEUE
    assert sorted(path.name for path in tmp_path.glob("began*")) == [path.name for path in began]
    assert sorted(path.name for path in tmp_path.glob("saved*")) == [f"saved{seed}" for seed in range(1, jobs + 1)]


def test_a_run_that_is_interrupted_before_its_training_says_so(tmp_path):
    """One that is alone, too, of which nothing else is told."""
    task, folder = task_of("resnet", tmp_path)
    code = f"""
import os, signal, sys
from common.tables import run
from common.tables.run import Task
class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.exit(run.run([{task!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (REQUEUE, "", "told to stop: run it again to resume\n")
    assert not folder.exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_that_are_interrupted_save_and_resume(tmp_path, jobs):
    line = "resnet_cifar/train.py --data digits --arch resnet20 --batch-size 32 --epochs 50 --resume auto"
    runs = {name: [line] for name in ("a", "b")[:jobs]}
    tasks, folders = zip(*(task_of(name, tmp_path, runs=runs) for name in runs), strict=True)
    process = start(tmp_path, list(tasks), jobs)
    wait_for(lambda: all((folder / "checkpoint.pt").exists() for folder in folders))
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1].decode()
    assert process.returncode == REQUEUE, errors
    for folder in folders:
        assert read_json(folder / "status.json")["status"] == "stopped"
        assert checkpoints.load(folder / "checkpoint.pt")["step"] >= 45


def test_workers_end_when_the_process_that_started_them_is_killed(tmp_path):
    code = f'trap "touch {tmp_path}/saved$seed; exit 75" TERM; touch {tmp_path}/began$seed; while true; do sleep 0.1; done'
    process = start(tmp_path, quick_tasks(1, 2), 2, stand_in(tmp_path / "x", code))
    wait_for(lambda: all((tmp_path / f"began{seed}").exists() for seed in (1, 2)))
    process.kill()
    wait_for(lambda: all((tmp_path / f"saved{seed}").exists() for seed in (1, 2)))
    process.communicate()


SHORT = "quickstart/regular quickstart/spectral --seeds 1"
FLAGS = "-- --epochs 6 --device cpu"


def test_runs_that_a_time_limit_stops_are_taken_up_elsewhere_from_the_archive(tmp_path, monkeypatch, capsys):
    """Two allocations on machines that share nothing but the archive; the end is that of runs that nobody stopped."""

    def allocation(name, words):
        monkeypatch.setattr(runs, "RESULTS", tmp_path / name)
        try:
            main(f"run {SHORT} {words} {FLAGS}".split())
        except SystemExit as stop:
            return stop.code
        return 0

    started = time.monotonic()
    assert allocation("whole", "") == 0
    minutes = 0.4 * (time.monotonic() - started) / 60  # too few for all runs, on a machine of any speed
    archive = tmp_path / "out" / "runs.tar"
    status, number = REQUEUE, 0
    while status == REQUEUE:
        taken_up = f"--from {archive}" if number else ""
        status = allocation(f"machine{number}", f"--minutes {minutes:.5f} --out {archive.parent} {taken_up}")
        number += 1
        assert number < 60, "no allocation got any further"
    assert (status, number > 1) == (0, True)
    whole, parts = (sorted((tmp_path / name).rglob("result.json")) for name in ("whole", f"machine{number - 1}"))
    assert len(whole) == len(parts) == 2
    for one, other in zip(whole, parts, strict=True):
        assert one.relative_to(tmp_path / "whole") == other.relative_to(tmp_path / f"machine{number - 1}")
        assert read_json(one)["metrics"] == read_json(other)["metrics"]
        first, second = weights(one.parent), weights(other.parent)
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    with tarfile.open(archive) as packed:
        assert not [name for name in packed.getnames() if name.endswith((".lock", "checkpoint-previous.pt"))]
    capsys.readouterr()
    assert allocation(f"machine{number - 1}", f"--from {archive}") == 0  # what is as far there stays as it is
    assert capsys.readouterr().err.count("is not ahead of it") == 2
    assert allocation("machine0", f"--from {archive}") == 0  # and what is behind gives way: nothing is trained again
    output = capsys.readouterr()
    assert output.err.count("holds a finished run of this configuration and seed: nothing to do") == 2


def test_of_two_copies_of_a_run_the_one_with_the_later_checkpoint_is_kept(tmp_path, monkeypatch, capsys):
    """A run that was killed has taken steps that no checkpoint holds."""
    archive, place = tmp_path / "runs.tar", tmp_path / "results" / "p" / "row" / "0" / "seed1"
    for saved, step, kept in ((800, 810, "800"), (500, 950, "800"), (900, 900, "900")):
        monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        (place / "checkpoint.pt").write_text(str(saved))
        write_json(place / "status.json", {"step": step, "saved_step": saved})
        if not archive.exists():
            pack([place], archive)
        unpack(archive)
        assert (place / "checkpoint.pt").read_text() == kept
        shutil.rmtree(tmp_path / "results")


@pytest.mark.parametrize("content", ["nothing", "junk", "outside", "link"])
def test_an_archive_that_is_missing_damaged_or_hostile_changes_nothing(tmp_path, monkeypatch, refuses, content):
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    archive = tmp_path / "runs.tar"
    if content == "junk":
        archive.write_bytes(b"no archive")
    elif content != "nothing":
        with tarfile.open(archive, "w") as packed:
            member = tarfile.TarInfo("../escaped.json" if content == "outside" else "link")
            if content == "link":
                member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            packed.addfile(member)
    refuses(main, f"run quickstart/full --from {archive}", f"--from {archive} ")
    assert list((tmp_path / "results").iterdir()) == []
    assert not (tmp_path / "escaped.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--minutes 0", "must be above 0 and below a million, got 0"),
        ("--minutes nan", "must be above 0 and below a million, got nan"),
        ("--seeds 1 --out x -- --save-dir y", "leave it out for several runs (got 1) and with --out"),
    ],
)
def test_limits_that_are_none_are_one_line(refuses, words, message):
    refuses(main, f"run quickstart/full {words}", message)


def test_a_stop_that_comes_while_a_worker_starts_reaches_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    make = run._Worker.__init__

    def make_and_stop(self, *args):
        make(self, *args)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run._Worker, "__init__", make_and_stop)
    code = f'trap "exit 75" TERM; for i in {{1..100}}; do sleep 0.1; done; touch {tmp_path}/ended$seed'
    assert run.run(quick_tasks(1, 2), 2, stand_in(tmp_path / "x", code)) == REQUEUE
    assert list(tmp_path.glob("ended*")) == []
