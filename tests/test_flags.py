"""Bad input to the ResNet program: one clear line, a non-zero exit, nothing trained and nothing written."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from common.experiments.files import ROOT
from resnet_cifar.train import main

FACTORIZED = "--data digits --arch resnet20 --rank-scale 0.111"


def fails(capsys, command, message, cwd=None):
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("resnet_cifar/train.py: error: ")
    assert message in output.err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--arch resnet18", "invalid choice: 'resnet18'"),
        ("--data mnist", "invalid choice: 'mnist'"),
        ("--learning-rates 0.1", "unrecognized arguments: --learning-rates 0.1"),
        ("--epochs 0", "must be at least 1 and below 2^31, got 0"),
        ("--epochs two", "invalid positive_int value: 'two'"),
        ("--rank-scale -0.1", "must be finite and not negative, got -0.1"),
        ("--rank-scale nan", "must be finite and not negative, got nan"),
        ("--lr inf", "must be finite and not negative, got inf"),
        ("--momentum 1.5", "--momentum must be in [0, 1), got 1.5"),
        ("--seed -1", "must be at least 0 and below 2^63, got -1"),
        ("--rank-scale 0.1 --target-ratio 0.1", "exclude each other"),
        ("--spectral", "--spectral needs factorized layers"),
        ("--wd2fd", "--wd2fd needs factorized layers"),
        ("--square", "--square needs factorized layers"),
        ("--rank-scale 0 --no-frob", "--no-frob needs factorized layers"),
        ("--dump-frobnorms", "--dump-frobnorms needs factorized layers"),
        ("--normalize x", "--normalize needs factorized layers"),
        ("--rank-scale 0.1 --residual 0.1", "give --square too"),
        ("--rank-scale 0.1 --spectral --init norm-matched", "exclude each other"),
        ("--rank-scale 0.1 --dump-frobnorms --normalize x", "exclude each other"),
        ("--rank-scale 1e12", "at most 100, got 1e+12"),
        ("--seed 99999999999999999999", "below 2^63"),
        ("--half --amp bf16", "exclude each other"),
        ("--data digits --image-size 4", "must be at least 8 for digits, got 4"),
        ("--data digits --num-classes 3", "digits has 10 classes, got 3"),
        ("--evaluate", "--evaluate needs --resume"),
        ("--evaluate --resume auto --dry-run", "--evaluate and --dry-run exclude each other"),
        ("--save-dir=", "argument --save-dir/--log-dir: must name a file or folder, got an empty string"),
        ("--evaluate --resume=", "argument --resume: must name a file or folder, got an empty string"),
        ("--evaluate --resume .", ". is a folder without a checkpoint that loads: give a checkpoint file or a run's folder"),
        ("--rank-scale 0.1 --pretrained .", "--pretrained . is a folder: give a file in it"),
        ("--evaluate --resume auto", "needs --save-dir"),
        ("--dry-run --data imagefolder", "needs --num-classes"),
        ("--dry-run --target-ratio 0.0001", "below the floor: rank 1 everywhere leaves 9,930 of 464,154"),
        ("--data digits --half --device cpu", "--amp fp16 (--half) needs a GPU"),
        ("--data digits --device tpu", "--device must be auto, cpu, cuda"),
        ("--data digits --resume nothing.pt", "there is no checkpoint at nothing.pt"),
        (f"{FACTORIZED} --pretrained nothing.pt", "there is no checkpoint at nothing.pt"),
        (f"{FACTORIZED} --normalize nothing.tensor", "nothing.tensor does not exist: a run with --dump-frobnorms writes"),
        ("--data imagefolder --data-dir nowhere", "must hold the folders train/ and test/"),
    ],
)
def test_bad_flags(capsys, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    save_dir = "" if "--save-dir" in message else " --save-dir run"
    fails(capsys, command + save_dir, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_word_with_line_breaks_gives_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["a\nb\u2028c"])
    assert capsys.readouterr().err.splitlines() == [
        "resnet_cifar/train.py: error: unrecognized arguments: a b c (--help lists the flags)"
    ]


@pytest.mark.parametrize("device", ["cuda", "0", "cuda:3"])
def test_cuda_that_is_absent(capsys, device):
    fails(capsys, f"--data digits --device {device}", "use --device cpu")


def test_norms_of_another_model_name_the_layers(capsys, tmp_path):
    main(f"{FACTORIZED} --dump-frobnorms --max-steps 2 --save-dir {tmp_path}/a".split())
    capsys.readouterr()
    file = f"{tmp_path}/a/frobnorms.tensor"
    command = f"--data digits --rank-scale 0.1 --save-dir {tmp_path}/b --normalize {file}"
    fails(capsys, f"{command} --arch resnet32", "missing there: layer1.3.conv1, layer1.3.conv2, layer1.4.conv1")
    fails(capsys, f"{command} --arch resnet20 --max-steps 3", "holds the norms of 2 steps, and this run makes 3")
    (tmp_path / "a" / "frobnorms.tensor").write_bytes(b"junk")
    fails(capsys, f"{command} --arch resnet20", "is not a file that --dump-frobnorms wrote")
    assert not (tmp_path / "b").exists()


LOADING = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name in ("torch", "torchvision", "resnet_cifar.rows"):
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
program = sys.argv[1]
sys.argv = sys.argv[1:]
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "command",
    [
        "resnet_cifar/train.py", "compression_baselines/train.py",
        "compression_baselines/sparse.py --method snip --target-ratio 1",
        "compression_baselines/prune.py --method c-obd --ratio 0.5 --pretrained x", "compression_baselines/measure.py x",
        "tensor_wrn/train.py digits teacher", "transformer_iwslt/prepare.py", "transformer_iwslt/train.py x",
        "transformer_iwslt/generate.py x --path x", "transformer_iwslt/translate.py --checkpoint x", "common.tables list",
        "common.vision.tiny_imagenet --data-dir nowhere",
    ],
)  # fmt: skip
def test_interrupted_outside_of_a_training_there_is_one_line(command):
    """As while torch or the rows are loaded; the exit status is that of SIGINT."""
    program, *words = command.split()
    done = subprocess.run([sys.executable, "-c", LOADING, program, *words], cwd=ROOT, capture_output=True, text=True)
    name = program if program.endswith(".py") else f"python -m {program}"
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", f"{name}: interrupted\n")


def test_a_directory_of_another_run_is_left_alone(capsys, tmp_path):
    main(f"{FACTORIZED} --max-steps 1 --save-dir {tmp_path}/a".split())
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    fails(capsys, f"{FACTORIZED} --max-steps 1 --lr 0.2 --save-dir {tmp_path}/a", "lr 0.1 there, 0.2 here")
    fails(capsys, f"{FACTORIZED} --max-steps 1 --seed 5 --save-dir {tmp_path}/a", "seed 0 there, 5 here")
    fails(capsys, f"{FACTORIZED} --max-steps 1 --dump-frobnorms --save-dir {tmp_path}/a", "without frobnorms.tensor")
    checkpoint = f"{tmp_path}/a/checkpoint.pt"
    fails(capsys, f"{FACTORIZED} --epochs 3 --resume {checkpoint} --save-dir {tmp_path}/b", "epochs 200 there, 3 here")
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert not (tmp_path / "b").exists()


def test_a_pretrained_checkpoint_must_be_dense_and_fit(capsys, tmp_path):
    main(f"{FACTORIZED} --max-steps 1 --save-dir {tmp_path}/a".split())
    capsys.readouterr()
    command = f"{FACTORIZED} --save-dir {tmp_path}/b --pretrained {tmp_path}/a/checkpoint.pt"
    fails(capsys, command, "is already factorized")
    fails(capsys, command.replace("resnet20", "resnet32"), "the checkpoint lacks 'layer1.3.")
    torch.save({"model": {"a": torch.zeros(1)}, "code": print}, tmp_path / "code.pt")
    fails(
        capsys, f"{FACTORIZED} --save-dir {tmp_path}/b --pretrained {tmp_path}/code.pt", "objects whose loading could run code"
    )


def test_dry_run_prints_one_json_object(capsys):
    main("--dry-run --data cifar100 --arch resnet32 --rank-scale 1.0 --square --wd2fd --spectral".split())
    description = json.loads(capsys.readouterr().out)
    assert description["parameters"] == {"original": 470_004, "compressed": 1_437_684, "ratio": 1_437_684 / 470_004}
    assert description["layers"][0]["name"] == "layer1.0.conv1"
    assert (description["layers"][0]["shape"], description["layers"][0]["rank"]) == ([16, 16, 3, 3], 48)
    assert description["config"]["rank_scale"] == 1.0
    main("--dry-run --arch resnet20".split())
    assert json.loads(capsys.readouterr().out)["layers"] == []


def test_the_program_runs_as_a_script(tmp_path):
    """From another directory, with upstream's spelling; an error leaves no traceback."""
    command = [
        sys.executable,
        str(ROOT / "resnet_cifar" / "train.py"),
        "--rank_scale",
        "0.111",
        "--weight_decay=1E-4",
        "--dry_run",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["weight_decay"] == 1e-4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "program",
    [f"{name}/train.py" for name in ("resnet_cifar", "compression_baselines", "tensor_wrn", "transformer_iwslt")]
    + ["compression_baselines/prune.py", "compression_baselines/sparse.py"],
)
def test_help_and_wrong_flags_do_not_wait_for_torch(program):
    """Half a second, of which most is Python itself; torch alone takes longer to load than the limit here."""
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: sys.exit('torch is loaded' if 'torch' in sys.modules else end.code)"
    )
    for flag, status, says in (("--help", 0, "--save-dir"), ("--nonsense", 2, "error: ")):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, ROOT / program, flag], capture_output=True, text=True)
        assert (done.returncode, says in done.stdout + done.stderr) == (status, True), done.stderr
        assert time.perf_counter() - started < 2
