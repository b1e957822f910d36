"""Tensor convolutions and WideResNets: forms against dense oracles, counts, decay, distillation, the program end to end."""

import copy
import json
import math
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import FrobeniusDecay, densify_, param_groups
from common.budget import count_parameters
from common.experiments import checkpoints
from common.experiments.files import read_json
from common.linalg import fan_out_init
from common.vision.data import Batch, Data
from tensor_wrn.config import WideResNetConfig
from tensor_wrn.distillation import attention, distillation_loss
from tensor_wrn.factorize import make_model, norm_matched_init, tensor_scale_for_ratio
from tensor_wrn.layers import FORMS, INITIALIZATIONS, TensorPointwise
from tensor_wrn.models import WideResNet, build
from tensor_wrn.rows import PROGRAM
from tensor_wrn.shapes import RULES, alike, split, stage_channels
from tensor_wrn.train import distillation, learning_rate, load_teacher, main

SHAPES = [(16, 160), (160, 320), (24, 36), (32, 32)]


def pointwise(form, inputs=24, outputs=36, scale=0.5, init="regular", dtype=torch.float64):
    torch.manual_seed(0)
    layer = FORMS[form](inputs, outputs, 3, scale, padding=1).to(dtype)
    layer.pointwise.initialize_(init)
    return layer.pointwise


@pytest.mark.parametrize("rule", RULES)
def test_tensors_of_the_papers_width_have_the_shapes_of_the_released_code(rule):
    channels = [(16, 160), (160, 160), (160, 320), (320, 320), (320, 640), (640, 640)]
    assert [split(inputs * outputs, rule) for inputs, outputs in channels] == [
        (16, 16, 10), (32, 32, 25), (40, 40, 32), (50, 64, 32), (64, 64, 50), (80, 80, 64),
    ]  # fmt: skip
    for count in (1, 2, 36, 97 * 4, 512):
        assert math.prod(split(count, rule)) == count
    assert sorted(split(13, rule)) == [1, 1, 13]


@pytest.mark.parametrize("width", range(1, 13))
def test_tensors_of_other_widths_too(width):
    """Two sides are the first divisors from the rounded cube root on, the last is what is left; tntorch has the same cores."""
    tntorch = pytest.importorskip("tntorch")
    model = build({"depth": 10, "width": width, "num_classes": 10, "form": "TensorTrain", "rank_scale": 0.3,
                   "tensor_shapes": "released"})  # fmt: skip
    channels = stage_channels(width)
    assert channels == (16, 16 * width, 32 * width, 64 * width)
    tensors = [module for module in model.modules() if isinstance(module, TensorPointwise)]
    assert len(tensors) == 6
    for tensor in tensors:
        count = tensor.in_channels * tensor.out_channels
        root = next(side for side in range(count) if (2 * side + 1) ** 3 > 8 * count)  # the cube root, rounded
        divisors = [side for side in range(1, count + 1) if count % side == 0]
        first = min(side for side in divisors if side >= root)
        second = min(side for side in divisors if side >= root and count // first % side == 0)
        assert tensor.shape == (first, second, count // (first * second))
        ranks = [max(1, round(0.3 * min(pair))) for pair in zip(tensor.shape, tensor.shape[1:], strict=False)]
        assert list(tensor.ranks()) == ranks
        cores = tntorch.Tensor(torch.randn(tensor.shape), ranks_tt=ranks).cores if width < 4 else []
        for core, theirs in zip(tensor.cores, cores, strict=bool(cores)):
            assert core.numel() == theirs.numel()
    assert split(32 * 32, "released") == (16, 16, 4)
    assert split(32 * 32, "nearest") == (8, 16, 8)
    assert alike(width) == (width == 10)


def test_the_rule_of_shapes_is_told_apart_where_it_makes_a_difference():
    def parse(flags):
        return WideResNetConfig.parse(f"cifar10 teacher {flags}".split())

    for width, rule in ((2, "released"), (4, "released"), (10, "nearest")):
        found = parse(f"--wrn-width {width} --conv Tucker_0.5")
        assert found.tensor_shapes == rule
        nearest = parse(f"--wrn-width {width} --conv Tucker_0.5 --tensor-shapes nearest")
        assert (found.config_hash() == nearest.config_hash()) == (rule == "nearest")
    assert parse("--wrn-width 2").tensor_shapes == parse("--wrn-width 2 --tensor-shapes nearest").tensor_shapes == "nearest"
    for row in (row for table in PROGRAM.tables for row in table.rows if not row.id.startswith(("full", "Conv"))):
        assert alike(PROGRAM.config(row).wrn_width)  # the paper's rows have the released shapes, by either name


@pytest.mark.parametrize("form", FORMS)
def test_the_tensor_is_the_product_of_its_cores(form):
    """Against one contraction over all indices at once; so are the weight, the norm and the convolution."""
    layer = pointwise(form)
    cores = [core.detach() for core in layer.cores]
    if form == "TensorTrain":
        expected = torch.einsum("ia,ajb,bk->ijk", *cores)
    elif form == "Tucker":
        expected = torch.einsum("abc,ia,jb,kc->ijk", *cores)
    else:
        expected = torch.einsum("ap,pbq,qc,ia,jb,kc->ijk", *cores)
    torch.testing.assert_close(layer.tensor(layer.cores), expected)
    torch.testing.assert_close(layer.weight, expected.reshape(36, 24, 1, 1))
    torch.testing.assert_close(layer.squared_norm(), expected.square().sum())
    x = torch.randn(2, 24, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, expected.reshape(36, 24, 1, 1)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("scale", [0.2, 0.6])
def test_decompositions_are_tntorchs(form, inputs, outputs, scale):
    tntorch = pytest.importorskip("tntorch")
    layer = pointwise(form, inputs, outputs, scale)
    tensor = torch.randn(layer.shape, dtype=torch.float64)
    with torch.no_grad():
        layer._set(layer._decompose(tensor))
    ranks = {"ranks_tt" if form == "TensorTrain" else "ranks_tucker": list(layer.ranks())}
    torch.testing.assert_close(layer.tensor(layer.cores), tntorch.Tensor(tensor, **ranks).torch(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_full_ranks_reproduce_the_tensor_and_truncation_loses_what_it_cuts(form):
    layer = pointwise(form, scale=1.0)
    tensor = torch.randn(layer.shape, dtype=torch.float64)
    with torch.no_grad():
        layer._set(layer._decompose(tensor))
    torch.testing.assert_close(layer.tensor(layer.cores), tensor)
    small = pointwise(form, scale=0.5)
    with torch.no_grad():
        small._set(small._decompose(tensor))
    # a sequence of orthogonal projections: what is lost and what is left are at right angles
    lost = (tensor - small.tensor(small.cores)).square().sum()
    torch.testing.assert_close(lost + small.tensor(small.cores).square().sum(), tensor.square().sum())


@pytest.mark.parametrize("form", FORMS)
def test_the_decay_of_the_cores_is_that_of_the_full_tensor(form):
    layer = pointwise(form)
    expected = torch.autograd.grad(layer.to_dense().square().sum() / 2, list(layer.cores))
    for ours, theirs in zip(layer.frobenius_grads(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    model = nn.Sequential(layer)
    FrobeniusDecay(model, 0.3).step()
    for core, gradient in zip(layer.cores, expected, strict=True):
        torch.testing.assert_close(core.grad, 0.3 * gradient)


@pytest.mark.parametrize("form", FORMS)
def test_initializations_have_the_scale_they_say(form):
    """Regular: entries of variance 2 / out. Norm-matched: the norm of the spectral start of the same draw."""
    for init in INITIALIZATIONS:
        layer = pointwise(form, 160, 160, 0.5, init, torch.float32)
        norm, full = layer.squared_norm().item(), 160 * 160 * 2 / 160
        if init == "regular":
            assert norm == pytest.approx(full, rel=0.35)
        elif init == "spectral":
            spectral = norm
            assert 0.1 * full < norm < 0.6 * full  # what half the ranks keep of a random tensor
        elif init == "norm-matched":
            assert norm == pytest.approx(spectral, rel=0.02)
        else:
            assert norm == pytest.approx(spectral / 6, rel=0.05)  # variance 1 / (3 in) instead of 2 / out
    with pytest.raises(ValueError, match="init must be one of regular, spectral, norm-matched, released, got 'xavier'"):
        layer.initialize_("xavier")


def test_the_norm_matched_start_has_the_norm_of_the_spectral_one_exactly(monkeypatch):
    layer = pointwise("TensorTrain", dtype=torch.float64)
    seen = []
    original = TensorPointwise._set
    monkeypatch.setattr(TensorPointwise, "_set", lambda self, cores: (original(self, cores), seen.append(self.squared_norm())))
    layer.initialize_("norm-matched")
    torch.testing.assert_close(layer.squared_norm(), seen[0])


@pytest.mark.parametrize(
    ("form", "scale", "parameters"),
    [
        ("Conv", None, 36_479_194),
        ("TensorTrain", 0.234, 607_160),
        ("TensorTrain", 0.705, 2_434_702),
        ("TuckerTT", 0.211, 608_501),
        ("TuckerTT", 0.68, 2_444_223),
        ("Tucker", 0.211, 442_918),
    ],
)
def test_golden_counts_of_wideresnet_28_10(form, scale, parameters):
    """All but the last are the released code's."""
    with torch.device("meta"):
        assert count_parameters(WideResNet(28, 10, 10, form, scale)) == parameters


@pytest.mark.parametrize(("ratio", "parameters"), [("0.01667", 610_282), ("0.06667", 2_435_034)])
def test_golden_counts_of_the_low_rank_network(ratio, parameters):
    args = WideResNetConfig.parse(f"cifar10 teacher --wrn_depth 28 --wrn_width 10 --target-ratio {ratio}".split())
    with torch.device("meta"):
        _, report = make_model(args, architecture_of(args))
    assert report.to_dict()["parameters"]["compressed"] == parameters


def architecture_of(args):
    return {"depth": args.wrn_depth, "width": args.wrn_width, "num_classes": 10, "form": args.form, "rank_scale": None}


def test_budgets_of_tensors_are_met_by_the_closest_scale():
    architecture = {"depth": 10, "width": 1, "num_classes": 10, "form": "Tucker", "rank_scale": None}

    def count(form, scale):
        with torch.device("meta"):
            return count_parameters(build({**architecture, "form": form, "rank_scale": scale}))

    full = count("Conv", 1.0)
    for form in FORMS:
        counts = [count(form, step / 200) for step in range(1, 201)]
        for target in (0.13, 0.18):
            found = count(form, tensor_scale_for_ratio({**architecture, "form": form}, target))
            assert abs(found - target * full) <= min(abs(value - target * full) for value in counts)
    with pytest.raises(ValueError, match=r"--target-ratio 0.01 is .* the fewest that Tucker can have are"):
        tensor_scale_for_ratio(architecture, 0.01)
    with pytest.raises(ValueError, match=r"--target-ratio 0.9 is .* the most that Tucker can have are"):
        tensor_scale_for_ratio(architecture, 0.9)


@pytest.mark.parametrize("form", FORMS)
def test_folding_keeps_the_function_and_copies_are_exact(form):
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10, form, 0.5).eval()
    for module in model.modules():
        if isinstance(module, TensorPointwise):
            module.initialize_("spectral")
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    again = WideResNet(10, 1, 10, form, 0.5).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    again.requires_grad_(False)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        densify_(again)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    densify_(model)
    for folded in (model, again):
        assert not any(isinstance(module, TensorPointwise) for module in folded.modules())
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_are_found_on_the_meta_device(form):
    with torch.device("meta"):
        assert WideResNet(10, 1, 10, form, 0.5)(torch.empty(2, 3, 32, 32)).shape == (2, 10)


def test_the_network_computes_what_its_definition_says():
    """Against the same network written with functions only; upstream's pre-activation form."""
    torch.manual_seed(0)
    model = WideResNet(16, 2, 10).eval()
    x = torch.randn(2, 3, 32, 32)

    def norm(x, bn):
        return F.relu(F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias))

    out, stages = F.conv2d(x, model.conv1.weight, padding=1), []
    for stage, stride in zip((model.block1, model.block2, model.block3), (1, 2, 2), strict=True):
        for index, block in enumerate(stage):
            first = norm(out, block.bn1)
            inner = F.conv2d(first, block.conv1.weight, stride=stride if index == 0 else 1, padding=1)
            inner = F.conv2d(norm(inner, block.bn2), block.conv2.weight, padding=1)
            out = inner + (F.conv2d(first, block.shortcut.weight, stride=stride) if index == 0 else out)
        stages.append(out)
    expected = F.linear(F.avg_pool2d(norm(out, model.bn1), 8).flatten(1), model.fc.weight, model.fc.bias)
    logits, activations = model(x, activations=True)
    torch.testing.assert_close(logits, expected)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(activations, stages, strict=True))
    assert [stage.shape[1:] for stage in stages] == [(32, 32, 32), (64, 16, 16), (128, 8, 8)]


@pytest.mark.parametrize("form", ["TensorTrain", "Tucker"])
def test_decay_shrinks_the_tensors(form):
    """20 steps without data: every tensor shrinks. In the released code the decay reaches no gradient and none would."""
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10, form, 0.5)
    layers = [module for module in model.modules() if isinstance(module, TensorPointwise)]
    for layer in layers:
        layer.initialize_("spectral")
    before = [layer.squared_norm().item() for layer in layers]
    decay = FrobeniusDecay(model, 5e-2)
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=5e-4, decay=decay), lr=0.1, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        decay.step()
        optimizer.step()
    assert all(layer.squared_norm().item() < 0.9 * norm for layer, norm in zip(layers, before, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_frozen_cores_get_no_decay(form):
    layer = pointwise(form)
    expected = layer.frobenius_grads()
    layer.cores[1].requires_grad_(False)
    for index, gradient in enumerate(layer.frobenius_grads()):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if index == 1 else expected[index])
    decay = FrobeniusDecay(nn.Sequential(layer), 0.5)
    decay.step()
    assert layer.cores[1].grad is None
    torch.testing.assert_close(decay.penalty(), 0.25 * layer.to_dense().square().sum())


def test_norm_matched_factors_are_the_regular_ones_at_the_norm_of_the_spectral_ones():
    torch.manual_seed(0)
    matrix = torch.randn(30, 24)
    torch.manual_seed(1)
    regular = fan_out_init(matrix, 5, kernel=3)
    torch.manual_seed(1)
    matched = norm_matched_init(matrix, 5, kernel=3)
    scale = matched[0][0, 0] / regular[0][0, 0]
    for one, other in zip(matched, regular, strict=True):
        torch.testing.assert_close(one, scale * other)
    values = torch.linalg.svdvals(matrix)[:5]
    torch.testing.assert_close((matched[0] @ matched[1]).norm(), values.norm())


def test_grouped_convolutions_and_wrong_ranks_are_refused():
    with pytest.raises(ValueError, match="TensorTrainConv2d mixes all channels: groups must be 1, got 2"):
        FORMS["TensorTrain"](4, 4, 3, 0.5, groups=2)
    for scale in (0.0, 1.1):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            FORMS["Tucker"](4, 4, 3, scale)


def test_building_every_decomposition_takes_seconds():
    args = WideResNetConfig.parse("cifar10 teacher --wrn_depth 28 --wrn_width 10 --conv TensorTrain_0.705 --spectral".split())
    started = time.process_time()  # of all threads: two of them take half of it
    make_model(args, architecture_of(args))
    assert time.process_time() - started < 40


@pytest.mark.parametrize("form", FORMS)
def test_a_step_compiles_without_graph_breaks(form):
    model = WideResNet(10, 1, 10, form, 0.5)
    for module in model.modules():
        if isinstance(module, TensorPointwise):
            module.initialize_("spectral")
    x = torch.randn(2, 3, 8, 8)
    explanation = torch._dynamo.explain(model)(x)
    assert explanation.graph_break_count == 0
    assert explanation.graph_count == 1


def test_attention_and_distillation_by_their_formulas():
    torch.manual_seed(0)
    shown = [[torch.randn(3, c, 4, 4, dtype=torch.float64) for c in (2, 5)] for _ in range(2)]
    logits, answers = torch.randn(2, 3, 7, dtype=torch.float64)
    labels = torch.tensor([1, 0, 6])
    places = shown[0][0].square().mean(1).view(3, 16)
    torch.testing.assert_close(attention(shown[0][0]).double(), places / places.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    p, q = (answers / 4).softmax(1), (logits / 4).softmax(1)
    divergence = (p * (p / q).log()).mean()
    distance = sum((attention(a) - attention(b)).square().mean() for a, b in zip(*shown, strict=True))
    expected = 0.1 * F.cross_entropy(logits, labels) + 2 * 16 * 0.9 * divergence + 10 * 3 / 2 * distance
    loss = distillation_loss(logits, shown[0], answers, shown[1], labels, temperature=4, alpha=0.9, beta=10)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    same = distillation_loss(logits, shown[0], logits, shown[0], labels, temperature=4, alpha=0.0, beta=1e3)
    torch.testing.assert_close(same.double(), F.cross_entropy(logits, labels), rtol=1e-5, atol=1e-6)


def test_cutout_is_a_square_around_a_pixel_and_leaves_the_rest_as_it_was():
    images, labels = torch.full((64, 3, 12, 12), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.long)
    options = {"flip": False, "padding": 0, "normalization": ((0.0,) * 3, (1.0,) * 3)}
    plain, cut = (Data((images, labels), (images, labels), 1, cutout=size, **options) for size in (0, 4))
    assert Data((images, labels), (images, labels), 1, cutout=None).cutout == 6
    assert torch.equal(plain.train_batch(0, 0, 0, 64).images, torch.ones(64, 3, 12, 12))
    holes = cut.train_batch(0, 0, 0, 64).images == 0
    assert torch.equal(holes[:, 0], holes[:, 2])
    heights, widths = holes[:, 0].any(2).sum(1), holes[:, 0].any(1).sum(1)
    assert torch.equal(holes[:, 0].sum((1, 2)), heights * widths)  # rectangles
    assert heights.max() == widths.max() == 4
    assert heights.min() == 2  # around a pixel of the border, half of it is outside
    shifted = Data((images, labels), (images, labels), 1, flip=True, cutout=4)
    same = Data((images, labels), (images, labels), 1, flip=True)
    assert torch.equal(shifted._plan(3, 1)[1][:, :3], same._plan(3, 1)[1][:, :3])  # crops and flips as without


DIGITS = "--data digits --wrn-depth 10 --wrn-width 1 --epochs 2 --device cpu"


@pytest.fixture
def train(tmp_path, capsys):
    def run(command, directory="r"):
        option = "-s" if " student" in command else "-t"
        main(f"{command} {option} {tmp_path}/{directory}".split())
        return Path(capsys.readouterr().out.strip()).parent

    return run


def test_a_checkpoint_from_before_the_rule_of_shapes_has_the_nearest(train, tmp_path, capsys):
    """It is evaluated, and teaches, as the network that it is."""
    run = train(f"digits teacher {DIGITS} --max-steps 2 --conv TensorTrain_0.5 --tensor-shapes nearest")
    state = checkpoints.load(run / "checkpoint.pt")
    assert state["architecture"].pop("tensor_shapes") == "nearest"
    torch.save(state, tmp_path / "old.pt")
    main(f"digits teacher --conv TensorTrain_0.5 --evaluate --resume {tmp_path}/old.pt".split())
    assert json.loads(capsys.readouterr().out)["accuracy"] == read_json(run / "result.json")["metrics"]["final"]
    teacher = load_teacher(tmp_path / "old.pt")
    assert [m.shape for m in teacher.modules() if isinstance(m, TensorPointwise)][3] == split(32 * 32, "nearest")


@pytest.mark.parametrize(
    "flags",
    [
        "--conv Conv --target-ratio 0.2 --spectral --wd2fd",
        "--conv TensorTrain_0.5 --spectral --wd2fd",
        "--conv Tucker --target-ratio 0.2 --init norm-matched",
        "--conv TuckerTT_0.4 --nocrswd",
    ],
)
def test_it_trains_resumes_and_evaluates(flags, train, capsys):
    """A run stopped within its second epoch and gone on with is the whole one bit for bit; the checkpoint alone evaluates."""
    command = f"cifar10 teacher {flags} {DIGITS} --resume auto"
    whole = train(command, "whole")
    train(f"{command} --max-steps 17", "parts")
    parts = train(command, "parts")
    one, other = (checkpoints.load(directory / "checkpoint.pt")["model"] for directory in (whole, parts))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    results = [read_json(directory / "result.json") for directory in (whole, parts)]
    assert results[0]["metrics"] == results[1]["metrics"]
    log = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert log[2]["train_loss"] < log[1]["train_loss"]
    assert all("frobenius_norm" in line for line in log)
    main(f"digits teacher --evaluate --resume {whole}/checkpoint.pt".split())
    assert json.loads(capsys.readouterr().out)["accuracy"] == results[0]["metrics"]["final"]


def test_the_decay_of_each_flag(train):
    expected = {
        "": lambda ratio: [("rest", 5e-4), ("factors", 5e-4 * ratio)],
        "--nocrswd": lambda ratio: [("rest", 5e-4)],
        "--wd2fd": lambda ratio: [("rest", 5e-4), ("factors", 0.0)],
        "--wd2fd --no-frob": lambda ratio: [("rest", 5e-4), ("factors", 0.0)],
    }
    for number, (flags, wanted) in enumerate(expected.items()):
        run = train(f"digits teacher --conv TensorTrain_0.5 {flags} {DIGITS} --max-steps 1", f"d{number}")
        result = read_json(run / "result.json")
        groups = [(entry["group"], entry["weight_decay"]) for entry in result["decays"] if "weight_decay" in entry]
        assert groups == wanted(result["parameters"]["ratio"]), flags
        frobenius = [entry["frobenius_decay"] for entry in result["decays"] if "frobenius_decay" in entry]
        assert frobenius == ([5e-4] if flags == "--wd2fd" else [])


@pytest.mark.parametrize(("flags", "kind"), [("--nocrswd", "plain"), ("", "crs")])
def test_decayed_shortcuts_have_both_decays_and_other_factors_their_own(flags, kind, train):
    """The released code's typo, against a step without it: the weights of the shortcuts move, and no others."""
    weights = []
    for number, more in enumerate(("", "--decay-shortcuts")):
        run = train(f"digits teacher --conv Conv --target-ratio 0.2 {flags} {more} {DIGITS} --max-steps 1", f"s{number}")
        weights.append(torch.load(run / "checkpoint.pt", weights_only=True)["model"])
    result = read_json(run / "result.json")
    assert result["config"]["decay"] == f"{kind}+shortcuts"
    assert [entry["frobenius_decay"] for entry in result["decays"] if "frobenius_decay" in entry] == [5e-4]
    plain, decayed = weights
    moved = {name.rsplit(".", 1)[0] for name in plain if not torch.equal(plain[name], decayed[name])}
    assert moved == {name.rsplit(".", 1)[0] for name in plain if ".shortcut." in name}


@pytest.mark.parametrize("form", ["TensorTrain_0.5", "Tucker_0.5", "TuckerTT_0.5"])
def test_tensors_train_in_mixed_precision(form, train, bfloat16):
    run = train(f"digits teacher --conv {form} --wd2fd --amp bf16 {DIGITS} --max-steps 2")
    assert math.isfinite(read_json(run / "result.json")["metrics"]["final_loss"])


def test_a_student_learns_from_its_teacher_and_resumes(train):
    teacher = train(f"digits teacher {DIGITS}", "teacher")
    student = f"digits student --conv TensorTrain_0.5 -t {teacher} --alpha 0.5 {DIGITS} --resume auto"
    whole = train(student, "whole")
    result = read_json(whole / "result.json")
    assert result["config"]["teacher"] is True
    assert set(result["inputs"]) == {"teacher"}
    train(f"{student} --max-steps 17", "parts")
    parts = train(student, "parts")
    assert read_json(parts / "result.json")["metrics"] == result["metrics"]


def test_the_loss_of_a_student_is_that_of_its_teacher_in_evaluation():
    args = WideResNetConfig.parse("digits student -t nowhere --alpha 0.3 --beta 7".split())
    torch.manual_seed(0)
    teacher, student = WideResNet(10, 1, 10), WideResNet(10, 1, 10)
    batch = Batch(torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 3, 4]))
    held = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss, logits = distillation(args, teacher)(student, batch)
    assert not teacher.training
    assert all(torch.equal(value, held[name]) for name, value in teacher.state_dict().items())
    answers, shown = copy.deepcopy(teacher).eval()(batch.images, activations=True)
    expected_logits, activations = copy.deepcopy(student)(batch.images, activations=True)
    torch.testing.assert_close(logits, expected_logits)
    strength = {"temperature": 4.0, "alpha": 0.3, "beta": 7.0}
    torch.testing.assert_close(loss, distillation_loss(logits, activations, answers, shown, batch.labels, **strength))
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_teachers_that_do_not_fit_and_checkpoints_that_tell_no_architecture(train, tmp_path, refuses):
    teacher = train(f"digits teacher {DIGITS} --max-steps 1", "teacher")
    state = checkpoints.load(teacher / "checkpoint.pt") if (teacher / "checkpoint.pt").exists() else None
    assert state is not None
    other = {**state, "architecture": {**state["architecture"], "num_classes": 7}}
    other["model"] = {**state["model"], "fc.weight": torch.zeros(7, 64), "fc.bias": torch.zeros(7)}
    torch.save(other, tmp_path / "seven.pt")
    torch.save({**state, "architecture": {**state["architecture"], "width": 2}}, tmp_path / "wide.pt")
    torch.save(state["model"], tmp_path / "bare.pt")
    for name, message in (
        ("seven", "distinguishes 7 classes, but digits has 10"),
        ("wide", "has shape (16, 16, 3, 3), expected (32, 16, 3, 3)"),
        ("bare", "does not record its architecture"),
    ):
        refuses(main, f"digits student -t {tmp_path}/{name}.pt -s {tmp_path}/x {DIGITS}", message)
    bare = f"--evaluate --resume {tmp_path}/bare.pt {DIGITS}"
    refuses(main, f"digits teacher --conv Tucker --target-ratio 0.15 {bare}", "Tucker needs a rank scale")
    refuses(main, f"digits teacher --conv Tucker_0.5 {bare}", "the checkpoint does not fit")
    assert not (tmp_path / "x").exists()


FORMS_LINE = "--conv must be Conv, TensorTrain_R, Tucker_R or TuckerTT_R with R in (0, 1]"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("imagenet teacher", "invalid choice: 'imagenet'"),
        ("digits learner", "invalid choice: 'learner'"),
        ("digits teacher --conv ACDC", f"{FORMS_LINE}, got 'ACDC'"),
        ("digits teacher --conv TensorTrain_1.5", f"{FORMS_LINE}, got 'TensorTrain_1.5'"),
        ("digits teacher --conv Tucker_0", f"{FORMS_LINE}, got 'Tucker_0'"),
        ("digits teacher --conv Tucker_x", f"{FORMS_LINE}, got 'Tucker_x'"),
        ("digits teacher --conv Conv_0.5", f"{FORMS_LINE}, got 'Conv_0.5'"),
        ("digits teacher --conv Tucker", "--conv Tucker needs a rank scale"),
        ("digits teacher --conv Tucker_0.5 --target-ratio 0.1", "sets the rank scale"),
        ("digits teacher --conv Tucker --rank-scale 2", "--rank-scale of Tucker must be at most 1, got 2"),
        ("digits teacher --wd2fd", "--wd2fd needs factorized layers"),
        ("digits teacher --conv Tucker_0.5 --wd2fd --nocrswd", "--wd2fd and --nocrswd exclude each other"),
        ("digits teacher --conv Tucker_0.5 --no-frob", "--no-frob needs --wd2fd"),
        ("digits teacher --conv Tucker_0.5 --decay-shortcuts", "--decay-shortcuts is for Conv without --wd2fd"),
        ("digits teacher --target-ratio 0.5 --wd2fd --decay-shortcuts", "--decay-shortcuts is for Conv without --wd2fd"),
        ("digits teacher --decay-shortcuts", "--decay-shortcuts needs factorized layers"),
        ("digits teacher --rank-scale 0.5 --init released", "--init released is for tensors"),
        ("digits teacher --tensor-shapes released", "--tensor-shapes is for tensors, got --conv Conv"),
        ("digits teacher --wrn-depth 12", "must be 6n + 4 and at least 10, got 12"),
        ("digits teacher --wrn-width 0", "--wrn-width must be between 1/16 and 100, got 0"),
        ("digits teacher --epoch_step [3,2]", "must be a list of increasing epochs"),
        ("digits teacher --epoch_step 60", "must be a list of increasing epochs"),
        ("digits teacher --epoch_step [60,60]", "must be a list of increasing epochs"),
        ("digits teacher --epoch_step [true]", "must be a list of increasing epochs"),
        ("digits teacher --wrn-width 1e300", "--wrn-width must be between 1/16 and 100, got 1e+300"),
        ("digits teacher --alpha 0.5", "--alpha is for the mode student"),
        ("digits student -t x --alpha 2", "--alpha must be in [0, 1]"),
        ("digits student -t x --temperature 0", "and --temperature above 0, got 0 and 0"),
        ("digits teacher -t x", "name the directory twice"),
        ("digits teacher -s x", "-s x is for the mode student"),
        ("digits student", "the mode student needs -t DIR"),
        ("digits student -t nowhere", "there is no checkpoint at nowhere/checkpoint.pt"),
        ("digits teacher --conv Tucker --target-ratio 0.001", "the fewest that Tucker can have are"),
    ],
)
def test_bad_flags(refuses, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    refuses(main, f"{flags} --save-dir run", message)
    assert list(tmp_path.iterdir()) == []


def test_defaults_are_the_recipe_and_the_readme_commands_parse():
    args = WideResNetConfig.parse(["cifar10", "teacher"])
    assert (args.epochs, args.lr, args.weight_decay, args.batch_size, args.cutout) == (200, 0.1, 5e-4, 128, None)
    rates = [learning_rate(args, epoch) for epoch in (0, 59, 60, 120, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.004, 0.0008])
    low_rank = "cifar10 teacher --wrn_depth 28 --wrn_width 10 --epochs 200 --conv Conv -t results/conv --target-ratio 0.06667"
    train_ = "cifar10 teacher --wrn_depth 28 --wrn_width 10 --epochs 200 --conv TensorTrain_0.234 -t results/tt"
    for command, form in ((low_rank, "Conv"), (train_, "TensorTrain")):
        args = WideResNetConfig.parse(f"{command} --spectral --wd2fd".split())
        assert (args.form, args.init, args.decay, args.save_dir.parts[0]) == (form, "spectral", "frobenius", "results")
    assert WideResNetConfig.parse("cifar10 teacher --GPU 3".split()).device == "3"
    dense = [
        WideResNetConfig.parse(f"cifar10 teacher {flags}".split())
        for flags in ("", "--nocrswd", "--conv Conv --target-ratio 0.0")
    ]
    assert len({args.config_hash() for args in dense}) == 1


def test_the_released_codes_settings_are_all_here():
    table2 = {row.id: row for row in PROGRAM.tables[0].rows}
    released = [row for row in table2.values() if not row.id.startswith("Tucker-")]
    assert len(released) == 37
    assert table2["TuckerTT-0.68-spectral-frobenius"].parameters == 2_444_223
