"""NVIDIA's multi-process service around several runs, with stand-ins for NVIDIA's programs."""

import os
import stat

import pytest

from common.tables.mps import CONTROL, shared_gpus, visible_gpus


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine with a GPU, and with a service that runs already, starts, fails or is missing; returns its record."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    record = tmp_path / "record"
    record.touch()

    def program(name, code):
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{code}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def make(service, gpu=True):
        lines = "GPU 0: NVIDIA H100 (UUID: GPU-aa)\nGPU 1: NVIDIA H100 (UUID: GPU-bb)\n  MIG 1g.10gb Device 0: (UUID: MIG-cc)"
        program("nvidia-smi", f"echo '{lines}'" if gpu else "echo 'No devices were found'; exit 6")
        running = "exit 0" if service == "runs" else "exit 1"
        on = "${CUDA_VISIBLE_DEVICES:+ on $CUDA_VISIBLE_DEVICES}"
        start = "echo 'Cannot find MPS' >&2; exit 1" if service == "fails" else "exit 0"
        if service != "missing":
            program(
                CONTROL,
                f"""if [[ ${{1:-}} == -d ]]; then echo "start $CUDA_MPS_PIPE_DIRECTORY{on}" >>{record}; {start}; fi
read order; echo "$order" >>{record}; if [[ $order == get_server_list ]]; then {running}; fi""",
            )
        return record

    return make


def test_a_service_is_started_for_the_runs_and_stopped_after_them(machine):
    record = machine("starts")
    folder = ""

    def runs():
        nonlocal folder
        with shared_gpus():
            folder = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
            assert os.path.isdir(folder)
            raise KeyError("a run")

    with pytest.raises(KeyError, match="a run"):
        runs()
    assert record.read_text().split("\n") == ["get_server_list", f"start {folder}", "quit", ""]
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    assert not os.path.exists(folder)


def test_gpus_that_were_chosen_have_one_name_for_the_service_and_for_the_runs(machine, monkeypatch):
    """The service would give other numbers to GPUs that it is started with."""
    record = machine("starts")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with shared_gpus():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-bb"
        assert record.read_text().endswith(" on GPU-bb\n")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        (None, ["GPU-aa", "GPU-bb"]),
        ("1, 0", ["GPU-bb", "GPU-aa"]),
        ("GPU-b", ["GPU-b"]),
        ("MIG-cc", ["MIG-cc"]),
        ("", []),
        ("-1", []),
    ],
)
def test_visible_gpus_have_the_names_of_the_driver(machine, monkeypatch, chosen, found):
    machine("missing")
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == found
    machine("missing", gpu=False)
    assert visible_gpus() == []


def test_a_service_that_runs_already_is_left_running(machine, monkeypatch):
    record = machine("runs")
    with shared_gpus():
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    assert record.read_text() == "get_server_list\n"
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere")
    with shared_gpus():
        assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/somewhere"
    assert record.read_text() == "get_server_list\n"


@pytest.mark.parametrize(
    ("service", "message"), [("missing", f"{CONTROL} is not on PATH"), ("fails", f"{CONTROL} did not start: Cannot find MPS")]
)
def test_runs_go_without_a_service_that_cannot_be_had(machine, capsys, service, message):
    machine(service)
    with shared_gpus():
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    assert capsys.readouterr().err.startswith("runs take turns on the GPU: ")
    with shared_gpus():
        pass
    assert message in capsys.readouterr().err


def test_nothing_is_started_without_a_gpu(machine, monkeypatch, capsys):
    record = machine("starts", gpu=False)
    with shared_gpus():
        pass
    machine("starts")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with shared_gpus():
        pass
    assert (record.read_text(), capsys.readouterr().err) == ("", "")
