"""A process that imports the programs once and runs each command in a fork of itself, which it can kill.

Importing torch and fairseq takes seconds, and a fork of a process that has done it takes none. Orders come as lines of JSON
on stdin: the module of a program, its words, a log file and, optionally, ``after`` (SIGKILL after that many seconds) or
``at`` (SIGKILL at that write, see :func:`kill_at`) and ``limit`` (largest file in bytes that it may write). Answers go to
stdout: the exit status (negative: the signal) and the seconds it took.
"""

import importlib
import io
import json
import os
import resource
import signal
import sys
import time
import traceback

import sklearn.datasets  # noqa: F401 (this and the next: what programs load late, and forks then share)
import torch
import torch._dynamo


def kill_at(write):
    """Have this process kill itself at a write, counted from 1: before a file is renamed, synced, or half of it is saved."""
    writes = 0

    def watched(function, name):
        def call(*args, **kwargs):
            nonlocal writes
            writes += 1
            if writes == write:
                if name == "save":  # what a process leaves that dies while it writes
                    buffer = io.BytesIO()
                    function(args[0], buffer)
                    target = args[1]
                    with open(target, "wb") if isinstance(target, str | os.PathLike) else target as file:
                        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
                        file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (torch, "save")):
        setattr(module, name, watched(getattr(module, name), name))


def child(order):
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if order.get("limit"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    if order.get("at"):
        kill_at(order["at"])
    status = 0
    try:
        importlib.import_module(order["program"]).main(order["words"])
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve():
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for line in sys.stdin:
        order = json.loads(line)
        importlib.import_module(order["program"])
        if order["program"].startswith("transformer_iwslt"):
            importlib.import_module("transformer_iwslt.engine").load()
        started = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            child(order)
        deadline = started + order["after"] if order.get("after") else float("inf")
        while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.perf_counter() > deadline:
                os.kill(pid, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.0005)
        print(json.dumps([os.waitstatus_to_exitcode(done[1]), time.perf_counter() - started]), flush=True)


if __name__ == "__main__":
    serve()
