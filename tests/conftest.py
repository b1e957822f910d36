"""Fixtures: folders of images, the real data sets where FNL_DATA names them, and processes for programs."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.experiments.distributed import has_bfloat16
from common.experiments.files import ROOT

# Workers of pytest-xdist share the processors with each other and with the programs that they start.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))))


@pytest.fixture(autouse=True)
def denormal_numbers():
    """Numbers as they were, after programs that ran in this process and flush denormal ones to zero."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def bfloat16():
    """Skip the test where the processor has no bfloat16 convolutions, which programs refuse."""
    if not has_bfloat16(torch.device("cpu")):
        pytest.skip("the processor has no bfloat16 convolutions")


@pytest.fixture
def refuses(capsys):
    """Check that a program ends a command with exit status 2 and one line on stderr that has a message in it."""

    def check(main, command, message):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(command.split())
        output = capsys.readouterr()
        assert (stop.value.code, output.out, output.err.count("\n")) == (2, "", 1), output.err
        assert message in output.err

    return check


@pytest.fixture
def image_folder(tmp_path):
    """A folder of 3 classes, 8 training and 4 test images of 16x16 pixels each."""
    generator = np.random.default_rng(0)
    root = tmp_path / "images"
    for split, count in (("train", 8), ("val", 4)):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def cifar_jpeg(tmp_path_factory):
    """CIFAR-10 (JPEG), a hundred training and twenty test images of each class, unpacked from FNL_DATA."""
    source = os.environ.get("FNL_DATA")
    if source is None:
        pytest.skip("FNL_DATA names no folder of real data")
    archive = Path(source) / "cifar10-images.zip"
    if not archive.exists():
        pytest.skip(f"{archive} does not exist")
    root = tmp_path_factory.mktemp("cifar")
    counts = {}
    with zipfile.ZipFile(archive) as packed:
        for name in sorted(packed.namelist()):
            folder = name.rpartition("/")[0]
            limit = 100 if "/train/" in name else 20
            if name.endswith(".jpg") and counts.get(folder, 0) < limit:
                counts[folder] = counts.get(folder, 0) + 1
                packed.extract(name, root)
    return root / "cifar10-images"


class Forks:
    """Runs each command in a process of its own, quickly: a fork of one that has imported the programs and run none."""

    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def __call__(self, program, words, **order):
        """Exit status and seconds of a command; ``log`` holds what it printed."""
        self.log.write_text("")
        self.process.stdin.write(json.dumps({"program": program, "words": words, "log": str(self.log), **order}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    made = Forks(tmp_path_factory.mktemp("forks") / "log.txt")
    yield made
    made.close()
