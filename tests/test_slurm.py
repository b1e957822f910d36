"""Rows on Slurm: the requeue path directly, and a real single-node Slurm where Debian's packages are installed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from common.experiments import checkpoints
from common.experiments.files import ROOT, read_json
from common.experiments.runs import REQUEUE
from common.tables import slurm
from common.tables.commands import CommandError
from common.tables.emit import emit
from common.tables.rows import programs, select

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def steps(directory):
    path = directory / "checkpoint.pt"
    return checkpoints.load(path)["step"] if path.exists() else 0


QUICK = ("resnet_cifar/train.py", "--data", "digits", "--arch", "resnet20", "--seed", "1")
REPLAY = (*QUICK, "--rank-scale", "0.1", "--normalize", "{after}/frobnorms.tensor")


def job_of(tmp_path, code, *commands):
    """A job whose programs are replaced by this code; the program and its flags are ``words``."""
    path = tmp_path / "stand_in.py"
    path.write_text(f"import pathlib, signal, sys, time\nwords = sys.argv[1:]\n{code}\n")
    return slurm.RowJob(commands or [QUICK], launcher=[sys.executable, str(path)])


def test_a_job_runs_the_commands_in_order_and_knows_the_last_result(tmp_path):
    code = f"""
if "--normalize" in words:
    pathlib.Path({str(tmp_path / "out")!r}).write_text(words[words.index("--normalize") + 1])
print("/c/result.json" if "--normalize" in words else "what else it says\\n/a/b/result.json")
"""
    assert job_of(tmp_path, code, QUICK, REPLAY)() == "/c/result.json"
    assert (tmp_path / "out").read_text() == "/a/b/frobnorms.tensor"


ONE_AT_A_TIME = """
if "--normalize" not in words:
    for word in ("start", "end"):
        with open({record!r}, "a") as file:
            file.write(word + " ")
        time.sleep(0.5)
print("/a/b/result.json")
"""


def test_jobs_that_need_the_same_run_wait_for_it(tmp_path):
    """Two jobs with one prerequisite at once: their runs of it do not overlap."""
    record = tmp_path / "record"
    jobs = [job_of(tmp_path, ONE_AT_A_TIME.format(record=str(record)), QUICK, REPLAY) for _ in range(2)]
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert record.read_text().split() == ["start", "end"] * 2


def test_a_script_waits_for_a_job_that_makes_the_run_it_needs(tmp_path):
    """Scripts and jobs have one lock, by the identity and seed of the run, so that neither makes it beside the other."""
    (program,) = select(programs(), table="normalization", row="*-regular-normalized")
    (table,), (row,) = program.tables, program.tables[0].rows
    emit([program], tmp_path / "generated-scripts")
    (script,) = tmp_path.glob("generated-scripts/*/*/*.sh")
    record = tmp_path / "record"
    job = job_of(tmp_path, ONE_AT_A_TIME.format(record=str(record)), *slurm.job(program, table, row, 1).commands)
    thread = threading.Thread(target=job)
    thread.start()
    wait_for(record.exists)
    launcher = f"{sys.executable} {tmp_path / 'stand_in.py'}"
    environment = {**ENVIRONMENT, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "LAUNCHER": launcher}
    started = [subprocess.Popen(["bash", str(script), "1"], env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    thread.join()
    assert record.read_text().split() == ["start", "end"] * 3


def test_a_command_that_asks_to_be_queued_again_is_run_again_and_a_failure_is_one(tmp_path):
    marker = tmp_path / "marker"
    job_of(tmp_path, f"p = pathlib.Path({str(marker)!r}); n = p.exists(); p.touch(); sys.exit(0 if n else {REQUEUE})")()
    assert marker.exists()
    with pytest.raises(CommandError, match="status 2"):
        job_of(tmp_path, "sys.exit(2)")()


def test_a_checkpoint_waits_for_the_program_to_save(tmp_path):
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    code = (
        f"def save(*_): time.sleep(1); pathlib.Path({str(saved)!r}).touch(); sys.exit(0)\n"
        f"signal.signal(signal.SIGUSR2, save); pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    job = job_of(tmp_path, code)
    thread = threading.Thread(target=job)
    thread.start()
    wait_for(ready.exists)
    again = job.checkpoint()
    assert saved.exists()
    assert again.function.commands == job.commands
    thread.join()


def test_jobs_are_the_rows_with_what_comes_before():
    (program,) = select(programs(), table="normalization", row="*-regular-normalized")
    job = slurm.job(program, program.tables[0], program.tables[0].rows[0], 2, ["--epochs", "1"])
    first, second = job.commands
    assert "--dump-frobnorms" in first
    assert "{after}/frobnorms.tensor" in second
    assert second[-4:] == ["--seed", "2", "--epochs", "1"]


def test_no_slurm_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="Slurm is unavailable"):
        slurm.submit([], tmp_path)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm of this machine alone, on the loopback interface."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if not all(shutil.which(program, path=path) for program in ("slurmctld", "slurmd", "sbatch", "srun")):
        pytest.skip("Slurm is not installed (Debian: slurmctld slurmd slurm-client)")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    host = socket.gethostname().partition(".")[0]
    (tmp_path / "state").mkdir()
    # A requeued job is held back until its old credential has expired: 5 seconds here, 120 by default.
    (tmp_path / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation={tmp_path}/state
SlurmdSpoolDir={tmp_path}/spool
SlurmctldPidFile={tmp_path}/slurmctld.pid
SlurmdPidFile={tmp_path}/slurmd.pid
SlurmctldLogFile={tmp_path}/slurmctld.log
SlurmdLogFile={tmp_path}/slurmd.log
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    daemons = [
        subprocess.Popen([name, "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for name in ("slurmctld", "slurmd")
    ]
    try:
        idle = ["sinfo", "--noheader", "--format=%t"]
        wait_for(lambda: subprocess.run(idle, capture_output=True, text=True).stdout.strip() == "idle", 40)
        yield
    finally:
        subprocess.run(["scancel", "--user", "root"], capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


@pytest.mark.slow
def test_a_preempted_row_is_queued_again_and_ends_as_if_nothing_had_happened(cluster, tmp_path):
    flags = ["--epochs", "40", "--device", "cpu", "--save-dir"]
    (program,) = select(programs(), table="quickstart", row="spectral+frobenius")
    row = replace(program.tables[0].rows[0], seeds=(1,))
    table = replace(program.tables[0], rows=(row,))
    one = replace(program, tables=(table,))
    (job,) = slurm.submit([one], tmp_path / "logs", parallel=1, gpus=0, cpus=1, flags=[*flags, str(tmp_path / "run")])
    wait_for(lambda: steps(tmp_path / "run") > 40)
    preempt = subprocess.Popen(["scancel", "--signal=USR2", job.job_id], stderr=subprocess.DEVNULL)  # it returns late
    log = tmp_path / "logs" / f"{job.job_id}_0_log.out"
    wait_for(lambda: "Requeued job" in log.read_text())
    stopped = steps(tmp_path / "run")
    assert 40 < stopped < 920
    assert read_json(tmp_path / "run" / "status.json")["status"] == "stopped"

    wait_for((tmp_path / "run" / "result.json").exists, 150)
    preempt.kill()
    preempt.wait()

    (words,) = slurm.job(program, table, row, 1, [*flags, str(tmp_path / "whole")]).commands
    subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    final = [read_json(tmp_path / name / "result.json")["metrics"] for name in ("run", "whole")]
    assert final[0] == final[1]
    assert signal.SIGUSR2.name in log.read_text()
