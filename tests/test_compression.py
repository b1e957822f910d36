"""Compression baselines: models at a budget, TinyImageNet, measured cost, and the program end to end."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import LowRankConfig, factorize_, rank_scale_for_ratio
from common.budget import count_parameters
from common.experiments import checkpoints
from common.experiments.files import read_json
from common.linalg import fan_out_init
from common.vision import tiny_imagenet
from common.vision.data import load
from compression_baselines import measure
from compression_baselines.config import LowRankBudgetConfig, PruningConfig
from compression_baselines.experiment import learning_rate
from compression_baselines.models import is_factorized
from compression_baselines.rows import PARAMETERS
from compression_baselines.structure import build
from compression_baselines.train import BudgetExperiment, main

CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200}


def dense(network, classes=10, width=64):
    name = "vgg" if network.startswith("vgg") else "resnet"
    depth = 19 if name == "vgg" else 32
    return build({"network": name, "depth": depth, "width": width, "num_classes": classes, "kaiming": False, "pruned": None})


@pytest.mark.parametrize(("network", "data"), PARAMETERS)
def test_golden_parameter_counts_at_each_budget(network, data):
    """The full counts and those at each ratio are the released code's; the width-32 ones are this code's."""
    for ratio, expected in PARAMETERS[network, data].items():
        with torch.device("meta"):
            model = dense(network, CLASSES[data], 32 if network.endswith("x32") else 64)
        if ratio != "0":
            scale = rank_scale_for_ratio(model, float(ratio), filter_fn=is_factorized)
            factorize_(model, LowRankConfig(scale, init="kaiming"), filter_fn=is_factorized)
        assert count_parameters(model) == expected


def test_ranks_of_the_ten_percent_networks():
    """Those of the released code: 9 to 37 in ResNet32 with 6 and 12 in its shortcuts, 9 to 73 in VGG19."""
    ranks = {}
    for network in ("resnet", "vgg"):
        with torch.device("meta"):
            model = dense(network)
        scale = rank_scale_for_ratio(model, 0.1, filter_fn=is_factorized)
        report = factorize_(model, LowRankConfig(scale, init="kaiming"), filter_fn=is_factorized)
        ranks[network] = {layer.name: layer.rank for layer in report.layers}
    assert [r for name, r in ranks["resnet"].items() if "shortcut" in name] == [6, 12]
    assert [r for name, r in ranks["resnet"].items() if "conv1" in name] == [9] * 5 + [18] * 5 + [37] * 5
    assert list(ranks["vgg"].values()) == [9] + [18] * 2 + [37] * 4 + [73] * 8


def test_networks_see_their_images():
    assert dense("vgg", 7).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert dense("vgg", 7).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert dense("resnet", 7, 32).eval()(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    with pytest.raises(ValueError, match="needs at least 32 pixels, got 16"):
        dense("vgg", 7)(torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("flags", "bias", "starts_at_zero"),
    [
        ("--network resnet --depth 8", "zero", True),
        ("--network resnet --depth 8 --classifier-bias default", "default", False),
        ("--network vgg --depth 11 --kaiming", "zero", True),
        ("--network vgg --depth 11 --kaiming --classifier-bias default", "default", False),
        ("--network vgg --depth 11", "default", True),  # it always did
    ],
)
def test_the_classifiers_bias_starts_where_its_flag_says_and_nothing_else_changes(flags, bias, starts_at_zero):
    config = LowRankBudgetConfig.parse([*flags.split(), "--data", "digits", "--target-ratio", "0.5"])
    assert config.classifier_bias == bias
    starts = []
    for name in (bias, "default"):
        torch.manual_seed(0)
        model, _ = BudgetExperiment(replace(config, classifier_bias=name)).make_model()
        starts.append(model.state_dict())
    (classifier,) = [name for name in starts[0] if name in ("linear.bias", "classifier.bias")]
    assert (starts[0][classifier] == 0).all().item() == starts_at_zero
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0] if name != classifier)


def test_a_classifiers_bias_that_is_zero_anyway_has_no_flag(refuses):
    refuses(main, "--network vgg --classifier-bias zero", "--classifier-bias is for resnet, and for vgg with --kaiming")
    assert LowRankBudgetConfig.parse(["--network", "vgg"]).config_hash() == LowRankBudgetConfig.parse([]).config_hash()
    assert "classifier_bias" not in PruningConfig.parse(["--method", "c-obd", "--ratio", "0.1", "--pretrained", "x"]).record()


def test_the_initialization_of_vgg_and_its_factors():
    torch.manual_seed(0)
    plain = build({"network": "vgg", "depth": 19, "width": None, "num_classes": 100, "kaiming": False, "pruned": None})
    kaiming = build({"network": "vgg", "depth": 19, "width": None, "num_classes": 100, "kaiming": True, "pruned": None})
    assert plain.classifier.weight.detach().std() == pytest.approx(0.01, rel=0.05)
    assert kaiming.classifier.weight.detach().std() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    u, vt = fan_out_init(torch.empty(256 * 3, 128 * 3), 50, kernel=3)
    for factor in (u, vt):
        assert factor.std() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)


@pytest.fixture
def tiny(tmp_path):
    """A data set as TinyImageNet's archive has it: 4 classes of 6 training images, 8 validation images that are not sorted,
    and 3 test images without labels.
    """
    generator = np.random.default_rng(0)
    root = tmp_path / "data" / "tiny-imagenet-200"
    names = [f"n0{index}" for index in range(4)]
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(names) + "\n")
    (root / "words.txt").write_text("".join(f"{name}\ta thing, object\n" for name in names))
    lines = []

    def draw(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, "JPEG")

    for index, name in enumerate(names):
        for image in range(6):
            draw(root / "train" / name / "images" / f"{name}_{image}.JPEG")
        boxes = "".join(f"{name}_{image}.JPEG\t0\t10\t63\t58\n" for image in range(6))
        (root / "train" / name / f"{name}_boxes.txt").write_text(boxes)
        for image in range(2):
            draw(root / "val" / "images" / f"val_{2 * index + image}.JPEG")
            lines.append(f"val_{2 * index + image}.JPEG\t{name}\t0\t0\t62\t62\n")
    for image in range(3):
        draw(root / "test" / "images" / f"test_{image}.JPEG")
    (root / "val" / "val_annotations.txt").write_text("".join(sorted(lines, reverse=True)))
    return root


UNPACKED = ["test", "train", "val", "wnids.txt", "words.txt"]


def test_tiny_imagenet_is_sorted_by_class_once(tiny):
    image = (tiny / "val" / "images" / "val_3.JPEG").read_bytes()
    data = load("tiny_imagenet", tiny.parent)
    assert (len(data), data.classes, data.image_size, data.padding) == (24, 4, 64, 4)
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (tiny / "val" / "n01" / "images" / "val_3.JPEG").read_bytes() == image
    assert sorted(path.name for path in tiny.iterdir()) == [".lock", *UNPACKED]
    before = (tiny / "val").stat().st_mtime_ns
    load("tiny_imagenet", tiny.parent)
    assert (tiny / "val").stat().st_mtime_ns == before


def test_a_sorted_tiny_imagenet_is_not_written_to(tiny, monkeypatch):
    tiny_imagenet.prepare(tiny.parent)
    (tiny / ".lock").unlink()
    for name in ("train", "val"):
        (tiny / name / ".DS_Store").write_bytes(b"\0")
        (tiny / name / ".thumbnails").mkdir()
        (tiny / name / ".thumbnails" / "0.png").write_bytes(b"\0")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a test may run as root, who may write anywhere
    data = load("tiny_imagenet", tiny.parent)
    assert (len(data), data.classes, data.test_labels.tolist()) == (24, 4, [0, 0, 1, 1, 2, 2, 3, 3])
    assert sorted(path.name for path in tiny.iterdir()) == UNPACKED
    (tiny / "val").rename(tiny / "sorted")
    (tiny / "test").rename(tiny / "val")
    with pytest.raises(ValueError, match=r"val is not sorted by class, and .* is not writable: copy it to another"):
        load("tiny_imagenet", tiny.parent)
    assert not (tiny / ".lock").exists()


def test_broken_tiny_imagenets_name_what_is_missing(tiny):
    annotations = tiny / "val" / "val_annotations.txt"
    text = annotations.read_text()
    annotations.unlink()
    with pytest.raises(ValueError, match=r"not sorted by class and .*val_annotations.txt is missing"):
        load("tiny_imagenet", tiny.parent)
    annotations.write_text(text + "val_99.JPEG\tn01\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"val_99.JPEG is listed in val_annotations.txt but missing"):
        load("tiny_imagenet", tiny.parent)
    assert sorted(path.name for path in tiny.iterdir()) == [".lock", *UNPACKED]  # nothing half-built
    assert (tiny / "val" / "images" / "val_3.JPEG").exists()
    annotations.write_text(text + "\n")
    with pytest.raises(ValueError, match="does not name an image and a class in line 9"):
        load("tiny_imagenet", tiny.parent)
    annotations.write_text("".join(text.splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"does not list val_\d.JPEG"):
        load("tiny_imagenet", tiny.parent)
    assert len(list((tiny / "val" / "images").iterdir())) == 8
    annotations.write_text(text)
    (tiny / "val").rename(tiny / ".val.unsorted")  # as an interruption between the renames leaves it
    (tiny / "train" / "n02" / "images" / "n02_5.JPEG").unlink()
    with pytest.raises(ValueError, match=r"train/n02 has 5 images, expected 6"):
        load("tiny_imagenet", tiny.parent)
    with pytest.raises(ValueError, match=r"train/n00 has 6 images, expected 500"):
        tiny_imagenet.prepare(tiny.parent, complete=True)
    (tiny / "wnids.txt").write_text("n00\nn01\nn02\nn03\nn04\n")
    with pytest.raises(ValueError, match="class n04 is only in the list"):
        load("tiny_imagenet", tiny.parent)


def test_tiny_imagenet_is_downloaded_checked_and_put_in_place_whole(tiny, tmp_path, monkeypatch):
    import shutil

    from torchvision.datasets import utils

    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tiny.parent, tiny.name))
    monkeypatch.setattr(
        utils, "download_url", lambda url, root, md5: shutil.copy(archive, Path(root) / "tiny-imagenet-200.zip")
    )
    monkeypatch.setattr(tiny_imagenet, "CLASSES", 4)
    monkeypatch.setattr(tiny_imagenet, "TRAIN", 6)
    monkeypatch.setattr(tiny_imagenet, "VAL", 2)
    (tmp_path / "new").mkdir()
    root = tiny_imagenet.prepare(tmp_path / "new")
    assert (root / "val" / "n03" / "images" / "val_7.JPEG").exists()
    names = {path.name for path in root.parent.iterdir()}
    assert names == {"tiny-imagenet-200", "tiny-imagenet-200.zip", ".tiny_imagenet.lock"}

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(utils, "download_url", refuse)
    with pytest.raises(OSError, match=r"tiny_imagenet is missing .*unpack http://cs231n.*90528d7c"):
        tiny_imagenet.prepare(tmp_path / "empty")


@pytest.fixture
def train(capsys):
    def run(command, *flags):
        main([*command.split(), *map(str, flags)])
        return Path(capsys.readouterr().out.strip()).parent

    return run


RESNET = "--network resnet --weight_decay 1E-4 --depth 8 --width 32 --target-ratio 0.2 --spectral --wd2fd"
VGG = "--dataset tiny_imagenet --network vgg --weight_decay 2E-4 --depth 19 --target-ratio 0.02 --spectral --wd2fd"


def test_the_second_readme_command_on_tiny_imagenet(train, tmp_path, tiny):
    run = train(VGG, "--log_dir", tmp_path / "vgg19", "--epoch", 1, "--data-dir", tiny.parent, "--batch_size", 8)
    result = read_json(run / "result.json")
    assert result["parameters"]["ratio"] == pytest.approx(0.02, abs=5e-4)
    assert {"group": "factors", "tensors": 30, "frobenius_decay": 2e-4} in result["decays"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_it_trains_measures_folds_resumes_and_evaluates(train, tmp_path, capsys):
    flags = ["--dataset", "digits", "--max-steps", 2, "--batch-size", 16, "--log_dir", tmp_path / "r"]
    run = train(RESNET, *flags, "--measure", "--densify", "--auto-resume")
    costs = read_json(run / "measure.json")["models"]
    assert set(costs) == {"as trained", "folded", "dense"}
    assert costs["as trained"]["parameters"] == read_json(run / "result.json")["parameters"]["compressed"]
    assert costs["folded"]["parameters"] == costs["dense"]["parameters"]
    assert costs["folded"]["batch1"]["multiply_adds"] == costs["dense"]["batch1"]["multiply_adds"]
    assert train(RESNET, *flags, "--measure", "--densify", "--auto-resume") == run
    main(["--dataset", "digits", "--evaluate", "--resume", str(run / "densified.pt")])
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert accuracy == read_json(run / "result.json")["metrics"]["densified"]
    with pytest.raises(SystemExit):
        measure.main([str(run / "checkpoint.pt"), "--device", "tpu"])
    torch.save({"architecture": {"arch": "resnet20"}, "model": {}}, tmp_path / "other.pt")
    with pytest.raises(SystemExit):
        measure.main([str(tmp_path / "other.pt")])
    assert "was written by another program: its architecture lacks 'network'" in capsys.readouterr().err
    nameless = checkpoints.load(run / "checkpoint.pt")
    nameless["config"]["image_size"] = None  # as of a folder of images
    torch.save(nameless, tmp_path / "nameless.pt")
    with pytest.raises(SystemExit):
        measure.main([str(tmp_path / "nameless.pt")])
    assert "does not record the size of its images: give --image-size, in pixels" in capsys.readouterr().err
    measure.main([str(run / "checkpoint.pt"), "--image-size", "16"])
    measured = json.loads(capsys.readouterr().out)
    assert measured["models"]["as trained"]["parameters"] == costs["as trained"]["parameters"]


def test_a_dense_checkpoint_factorized_at_full_rank_keeps_its_accuracy(train, tmp_path, capsys):
    digits = ["--dataset", "digits", "--image-size", 16, "--batch-size", 64]
    run = train("--network resnet --depth 8 --width 32", *digits, "--max-steps", 12, "--log_dir", tmp_path / "dense")
    state = checkpoints.load(run / "checkpoint.pt")
    model = build(state["architecture"])
    model.load_state_dict(state["model"])
    factorize_(model, LowRankConfig(2.0), filter_fn=is_factorized)
    torch.save({"architecture": state["architecture"], "model": model.state_dict()}, tmp_path / "full-rank.pt")
    main(["--dataset", "digits", "--image-size", "16", "--evaluate", "--resume", str(tmp_path / "full-rank.pt")])
    assert json.loads(capsys.readouterr().out)["accuracy"] == read_json(run / "result.json")["metrics"]["final"]


def test_multiply_adds_and_memory_are_those_of_a_known_layer():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False))
    found = measure.cost(model, 16, repeats=1)
    assert found["batch1"]["multiply_adds"] == 16 * 16 * 8 * 3 * 9
    assert found["batch128"]["multiply_adds"] == 128 * 16 * 16 * 8 * 3 * 9
    assert found["batch128"]["peak_activation_bytes"] == 128 * 16 * 16 * 8 * 4
    chain = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(4)))
    one = 128 * 3 * 16 * 16 * 4
    assert measure.cost(chain, 16, repeats=1)["batch128"]["peak_activation_bytes"] == 2 * one  # input and output of a layer
    thin = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1, bias=False))
    factorize_(thin, LowRankConfig(0.1, init="kaiming"))
    x = torch.zeros(1, 256, 2, 2)
    with torch.no_grad(), measure.PeakMemory([x, *thin.parameters()]) as memory:
        thin(x)
    assert memory.live == 0  # views of the factors are not counted, and the output is gone
    assert 4 * 4 * (77 + 256) <= memory.peak < 100_000
    assert found["index_bits"] == 0
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, 0, 0, 0] = 1
    assert measure.index_bits(model) == 8  # one position among 216
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].weight[0, 0, 0, 0] = 0
    assert measure.index_bits(model) == 216  # a bitmap, also of a layer that has hardly a zero


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--network alexnet", "invalid choice: 'alexnet'"),
        ("--network resnet --depth 0", "must be 6n + 2 and at least 8, got 0"),
        ("--network vgg --data digits --image-size 8", "needs at least 32 pixels, got 8"),
        ("--network resnet --depth 30", "must be 6n + 2 and at least 8, got 30"),
        ("--network vgg --depth 18", "must be 11, 13, 16 or 19, got 18"),
        ("--network vgg --width 32", "--width is for resnet"),
        ("--network resnet --kaiming", "--kaiming is for vgg"),
        ("--network resnet --width 48", "invalid choice: 48"),
        ("--dataset imagenet", "invalid choice: 'imagenet'"),
        ("--wd2fd", "--wd2fd needs factorized layers"),
        ("--target-ratio 0.1 --rank-scale 0.1", "exclude each other"),
        ("--dry-run --target-ratio 0.0001", "'classifier.weight' keeps 5,120 of them dense"),
    ],
)
def test_bad_flags(refuses, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    refuses(main, f"{command} --log_dir run", message)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_architecture_names_the_first_mismatch(train, tmp_path, refuses):
    small = "--network resnet --depth 8 --dataset digits --batch-size 16"
    run = train(f"{small} --width 32 --max-steps 1", "--log_dir", tmp_path / "a")
    command = f"{small} --target-ratio 0.5 --log_dir {tmp_path}/b --pretrained {run}/checkpoint.pt"
    refuses(main, command, "'conv1.weight' has shape (32, 3, 3, 3), expected (64, 3, 3, 3)")


def test_defaults_are_the_recipe():
    vgg, resnet = LowRankBudgetConfig.parse([]), LowRankBudgetConfig.parse(["--network", "resnet"])
    assert (vgg.network, vgg.depth, vgg.weight_decay, vgg.epochs, vgg.batch_size, vgg.lr) == ("vgg", 19, 2e-4, 200, 128, 0.1)
    assert (resnet.depth, resnet.width, resnet.weight_decay) == (32, 64, 1e-4)
    assert [learning_rate(vgg, epoch) for epoch in (0, 99, 100, 150)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
