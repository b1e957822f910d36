"""Structured pruning: Fisher factors, scores and updates against explicit matrices, surgery, and the program end to end."""

import copy
import json
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from common.budget import count_parameters
from common.experiments import checkpoints
from common.experiments.files import read_json
from common.experiments.runs import REQUEUE
from common.vision.data import Data
from compression_baselines import prune, structure, train
from compression_baselines.config import PRUNERS, PruningConfig
from compression_baselines.pruners import channels, eigenbasis, fisher, scores
from compression_baselines.pruners.select import Ranking, removed_for_budget
from compression_baselines.rows import PARAMETERS, PROGRAM
from compression_baselines.structure import UnionAdd, build, convolutions, keep_channels_

RESNET = {"network": "resnet", "depth": 8, "width": 32, "num_classes": 10, "kaiming": False, "pruned": None}


class TwoLayers(nn.Module):
    """Two convolutions; small enough for the whole Fisher matrix of each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 5, 1, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).sum((2, 3))


@pytest.fixture
def two():
    torch.manual_seed(0)
    model = TwoLayers().double()
    images, labels = torch.randn(12, 3, 4, 4, dtype=torch.float64), torch.randint(0, 5, (12,))
    return model, images, labels, DataLoader(TensorDataset(images, labels), 5)


def inputs_and_gradients(model, images, labels):
    """Patches (N, positions, n) that each convolution sees, and gradients (N, positions, out) of log p at its output."""
    found = {}
    x = images
    for name, layer in (("first", model.first), ("second", model.second)):
        out = layer(x).detach().requires_grad_()
        logits = model.second(torch.tanh(out)).sum((2, 3)) if name == "first" else out.sum((2, 3))
        score = F.log_softmax(logits, 1).gather(1, labels[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, out)
        patches = F.unfold(x, layer.kernel_size, padding=layer.padding).mT
        found[name] = patches, gradient.flatten(2).mT
        x = torch.tanh(out.detach())
    return found


def test_kronecker_factors_are_the_means_of_their_definition(two):
    model, images, labels, loader = two
    found = fisher.kronecker(model, convolutions(model), loader, "empirical")
    for name, (patches, gradients) in inputs_and_gradients(model, images, labels).items():
        a = torch.einsum("nti,ntj->ij", patches, patches) / len(images)
        g = torch.einsum("nti,ntj->ij", gradients, gradients) / gradients.shape[0] / gradients.shape[1]
        torch.testing.assert_close(found[name][0], a)
        torch.testing.assert_close(found[name][1], g)
    assert not model.first._forward_hooks


def test_kronecker_factors_are_those_of_curvlinops(two):
    """Up to the scale of each factor, which its conventions choose otherwise."""
    curvlinops = pytest.importorskip("curvlinops")
    model, images, labels, loader = two
    batches, parameters = [(images, labels)], list(model.parameters())
    operator = curvlinops.KFACLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, batches, fisher_type="empirical", check_deterministic=False
    )
    operator.compute_kronecker_factors()
    state = operator.state_dict()
    for name, factors in fisher.kronecker(model, convolutions(model), loader, "empirical").items():
        for kind, factor in zip(("input", "gradient"), factors, strict=True):
            other = state[f"{kind}_covariances"][name]
            torch.testing.assert_close(factor / factor.trace(), other / other.trace())


def fisher_matrix(model, layer, images, labels):
    """The whole Fisher of a layer's weight, from the gradient of every image."""
    rows = []
    for image, label in zip(images, labels, strict=True):
        score = F.log_softmax(model(image[None]), 1)[0, label]
        rows.append(torch.autograd.grad(score, layer.weight)[0].flatten())
    jacobian = torch.stack(rows)
    return jacobian.mT @ jacobian / len(images)


def test_the_diagonal_and_c_obd_are_those_of_the_whole_fisher(two):
    model, images, labels, loader = two
    found = fisher.diagonal(model, convolutions(model), loader, "empirical")
    for name, layer in convolutions(model).items():
        explicit = fisher_matrix(model, layer, images, labels)
        torch.testing.assert_close(found[name].flatten(), explicit.diagonal(), rtol=1e-5, atol=1e-9)  # sums in float32
        ranking = channels.rank(model, "c-obd", {name: (d,) for name, d in found.items()}, 0.5)
        weight = layer.weight.detach()
        for channel, score in enumerate(ranking.scores[name]):
            alone = torch.zeros_like(weight)
            alone[channel] = weight[channel]
            assert score == pytest.approx((alone.flatten().square() * explicit.diagonal()).sum().item() / 2, rel=1e-5)


def test_the_true_fisher_draws_labels_from_the_network():
    """Many draws for one image come near the exact expectation over labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.Flatten()).double()
    image = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    labels = torch.zeros(20_000, dtype=torch.long)
    loader = DataLoader(TensorDataset(image.expand(20_000, -1, -1, -1).contiguous(), labels), 5_000)
    _, g = fisher.kronecker(model, {"0": model[0]}, loader, "true")["0"]
    p = model(image).softmax(1)[0].detach()
    torch.testing.assert_close(g, p.diag() - torch.outer(p, p), rtol=0, atol=0.01)


@pytest.fixture
def problem():
    """A weight (4, 6), its factors, and the explicit damped Fisher (24, 24), all positive definite."""
    torch.manual_seed(1)
    weight = torch.randn(4, 6, dtype=torch.float64)
    a, g = (m @ m.mT for m in (torch.randn(6, 9, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)))
    damped = [m + scores.DAMPING * m.trace() / len(m) * torch.eye(len(m), dtype=torch.float64) for m in (g, a)]
    return weight, a, g, torch.kron(*damped)


def test_c_obs_against_the_explicit_inverse(problem):
    weight, a, g, matrix = problem
    inverse = torch.linalg.inv(matrix)
    saliency = (weight.flatten().square() / inverse.diagonal() / 2).view(4, 6).sum(1)
    torch.testing.assert_close(scores.c_obs(weight, a, g), saliency)
    removed = torch.tensor([True, False, True, False])
    step = torch.zeros(24, dtype=torch.float64)
    for index in removed.repeat_interleave(6).nonzero()[:, 0]:
        step -= weight.flatten()[index] / inverse[index, index] * inverse[:, index]
    torch.testing.assert_close(scores.c_obs_update(weight, a, g, removed), weight + step.view(4, 6))


def test_kron_obd_is_the_quadratic_form_of_a_channel(problem):
    weight, a, g, _ = problem
    matrix = torch.kron(g, a)
    for channel, score in enumerate(scores.kron_obd(weight, a, g)):
        alone = torch.zeros_like(weight)
        alone[channel] = weight[channel]
        torch.testing.assert_close(score, alone.flatten() @ matrix @ alone.flatten() / 2)


def constrained_minimum(weight, matrix, removed):
    """The smallest d^T F d / 2 over changes d that zero the removed channels, and the changed weight; by its KKT system."""
    gone = removed.repeat_interleave(weight.shape[1])
    selection = torch.eye(weight.numel(), dtype=weight.dtype)[gone]
    zeros = torch.zeros(len(selection), len(selection), dtype=weight.dtype)
    system = torch.cat([torch.cat([matrix, selection.mT], 1), torch.cat([selection, zeros], 1)])
    target = torch.cat([torch.zeros(weight.numel(), dtype=weight.dtype), -weight.flatten()[gone]])
    change = torch.linalg.solve(system, target)[: weight.numel()]
    return change @ matrix @ change / 2, weight + change.view_as(weight)


def test_kron_obs_is_the_constrained_minimum(problem):
    weight, a, g, _ = problem
    damped = g + scores.DAMPING * g.trace() / 4 * torch.eye(4, dtype=torch.float64)
    matrix = torch.kron(damped, a)
    for channel, score in enumerate(scores.kron_obs(weight, a, g)):
        value, _ = constrained_minimum(weight, matrix, torch.arange(4) == channel)
        torch.testing.assert_close(score, value)
    removed = torch.tensor([False, True, True, False])
    _, best = constrained_minimum(weight, matrix, removed)
    changed = scores.kron_obs_update(weight, a, g, removed)
    torch.testing.assert_close(changed, best)
    assert changed[removed].abs().max() < 1e-12


def test_eigendamage_scores_are_those_of_the_explicit_eigenbasis(problem):
    """Each eigenvector of G (x) A carries (q^T w)^2 lambda / 2; a direction's score is the sum over those it is part of."""
    weight, a, g, _ = problem
    rotated, q_a, q_g, inputs, outputs = scores.eigendamage(weight[:, :, None, None], a, g)
    vectors = torch.kron(q_g, q_a)
    values = vectors.mT @ torch.kron(g, a) @ vectors
    torch.testing.assert_close(values, values.diagonal().diag(), atol=1e-8, rtol=0)
    damage = ((vectors.mT @ weight.flatten()).square() * values.diagonal() / 2).view(4, 6)
    torch.testing.assert_close(inputs, damage.sum(0))
    torch.testing.assert_close(outputs, damage.sum(1))
    torch.testing.assert_close(rotated[:, :, 0, 0], q_g.mT @ weight @ q_a)
    total = weight.flatten() @ torch.kron(g, a) @ weight.flatten() / 2
    torch.testing.assert_close(inputs.sum(), total)


def test_the_channel_factor_averages_kernel_positions():
    torch.manual_seed(0)
    a = torch.randn(6 * 9, 6 * 9, dtype=torch.float64)
    expected = torch.stack([a[p::9, p::9] for p in range(9)]).mean(0)
    torch.testing.assert_close(scores.channel_factor(a, 6), expected)


def test_ranking_removes_the_least_important_within_the_limit():
    ranking = Ranking({"a": torch.tensor([5.0, 1.0, 3.0, 2.0]), "b": torch.tensor([0.1, 0.2])}, 0.5)
    assert ranking.kept(0) == {"a": [0, 1, 2, 3], "b": [0, 1]}
    assert ranking.kept(1) == {"a": [0, 1, 2, 3], "b": [1]}
    assert ranking.kept(3) == {"a": [0, 2, 3], "b": [1]}
    assert ranking.kept(6) == {"a": [0, 2], "b": [1]}  # half of each stay
    assert Ranking({"a": torch.arange(3.0)}, 0.99).kept(3) == {"a": [2]}  # never all
    with pytest.raises(ValueError, match="the scores of b are not finite"):
        Ranking({"a": torch.ones(2), "b": torch.tensor([float("nan")])}, 0.5)


def test_the_budget_is_met_by_the_closest_count():
    ranking = Ranking({"a": torch.arange(10.0)}, 0.9)

    def count(kept):
        return 7 * len(kept["a"])

    for budget in range(7, 71):
        errors = [abs(count(ranking.kept(removed)) - budget) for removed in range(11)]
        removed = removed_for_budget(ranking, budget, count)
        assert abs(count(ranking.kept(removed)) - budget) == min(errors)
    with pytest.raises(ValueError, match=r"budget of 5 parameters .* 7 remain"):
        removed_for_budget(ranking, 5, count)
    with pytest.raises(ValueError, match=r"budget of 80 parameters .* has at most 70"):
        removed_for_budget(ranking, 80, count)


def random_channels(model, generator, before=None):
    kept = {}
    for name, conv in convolutions(model).items():
        held = before[name] if before else list(range(conv.out_channels))
        count = int(torch.randint(1, len(held) + 1, (1,), generator=generator))
        kept[name] = sorted(held[i] for i in torch.randperm(len(held), generator=generator)[:count].tolist())
    return kept


def masked(model, kept):
    """The dense network with what is pruned set to zero behind its normalization: what the cut network must compute."""
    for (name, layer), (_, norm) in pairwise(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            mask = torch.zeros(layer.out_channels, 1, 1)
            mask[kept[name]] = 1
            norm.register_forward_hook(lambda module, args, out, mask=mask: out * mask)
    return model


@pytest.mark.parametrize("network", ["resnet", "vgg"])
def test_the_cut_network_computes_what_the_masked_one_does(network):
    torch.manual_seed(0)
    architecture = RESNET if network == "resnet" else {**RESNET, "network": "vgg", "depth": 11}
    model = build(architecture)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    model.eval()
    generator = torch.Generator().manual_seed(3)
    kept = random_channels(model, generator)
    fewer = random_channels(model, generator, kept)
    x = torch.randn(2, 3, 32, 32)
    cut = copy.deepcopy(model)
    keep_channels_(cut, kept)
    torch.testing.assert_close(cut(x), masked(copy.deepcopy(model), kept)(x), rtol=1e-4, atol=1e-4)
    keep_channels_(cut, fewer, kept)  # in two rounds, as iterative pruning goes
    torch.testing.assert_close(cut(x), masked(copy.deepcopy(model), fewer)(x), rtol=1e-4, atol=1e-4)
    rebuilt = build({**architecture, "pruned": {"kind": "channels", "kept": fewer}}).eval()
    rebuilt.load_state_dict(cut.state_dict())
    assert torch.equal(rebuilt(x), cut(x))
    assert any(isinstance(module, UnionAdd) for module in cut.modules()) == (network == "resnet")


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_whole_eigenbasis_keeps_the_function(rounds):
    torch.manual_seed(0)
    model = build(RESNET).eval()
    x = torch.randn(64, 3, 8, 8)
    expected = model(x)
    loader = DataLoader(TensorDataset(x, torch.randint(0, 10, (64,))), 32)
    for _ in range(rounds):
        rotated = eigenbasis.rotate(model, loader, "true")
        kept = eigenbasis.rank(rotated, 0.9).kept(0)
        sizes = {name: (len(kept[f"{name}/inputs"]), len(kept[f"{name}/outputs"])) for name in rotated}
        eigenbasis.prune_(model, rotated, kept, sizes, separable=False)
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-4)


def test_bottlenecks_stand_only_where_they_are_smaller():
    model = build(RESNET)
    kept = {}
    for name, conv in convolutions(model).items():
        kept |= {f"{name}/inputs": list(range(conv.in_channels)), f"{name}/outputs": list(range(conv.out_channels))}
    kept["layer3.0.conv2/inputs"] = kept["layer3.0.conv2/outputs"] = list(range(9))
    assert eigenbasis.sizes(model, kept, separable=False) == {"layer3.0.conv2": (9, 9)}
    count = count_parameters(model) - 128 * 128 * 9 + 2 * 9 * 128 + 9 * 9 * 9
    assert eigenbasis.count(model, {"layer3.0.conv2": (9, 9)}, separable=False) == count
    separable = count_parameters(model) - 128 * 128 * 9 + 2 * 9 * 128 + 9 * 9
    assert eigenbasis.count(model, {"layer3.0.conv2": (9, 12)}, separable=True) == separable


def test_a_separable_kernel_of_few_terms_is_found_again():
    torch.manual_seed(0)
    u, v, s = (torch.randn(size, 3, dtype=torch.float64) for size in (3, 5, 9))
    kernel = torch.einsum("om,im,km->oik", u, v, s).view(3, 5, 3, 3)
    eye_in, eye_out = torch.eye(5, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    into, depthwise, out_of = eigenbasis._separate(eye_in, kernel, eye_out, 3)
    again = torch.einsum("om,mkl,mi->oikl", out_of, depthwise[:, 0], into)
    assert (again - kernel).norm() < 1e-2 * kernel.norm()


DIGITS = "--network resnet --depth 8 --width 32 --dataset digits --image-size 8 --batch-size 128 --device cpu"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A trained dense network."""
    path = tmp_path_factory.mktemp("dense")
    train.main(f"{DIGITS} --epochs 4 --lr 0.05 --save-dir {path}".split())
    return path


@pytest.fixture
def run(dense, tmp_path, capsys):
    def start(flags, directory="r"):
        prune.main(f"{DIGITS} --pretrained {dense}/checkpoint.pt --save-dir {tmp_path}/{directory} {flags}".split())
        return Path(capsys.readouterr().out.strip()).parent

    return start


@pytest.mark.parametrize("method", PRUNERS)
def test_every_pruner_end_to_end(method, run, dense, capsys):
    ratio = 0.15 if method == "eigendamage-separable" else 0.3  # depthwise layers of full size have less than 0.3
    directory = run(f"--method {method} --target-ratio {ratio} --epochs 2 --lr 0.01 --fisher-samples 256")
    result = read_json(directory / "result.json")
    model = build(checkpoints.load(directory / "checkpoint.pt")["architecture"])
    assert result["parameters"]["compressed"] == count_parameters(model)
    assert result["parameters"]["ratio"] == pytest.approx(ratio, abs=0.01)  # one unit more or less
    epochs = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    prune.main(f"--dataset digits --image-size 8 --method {method} --evaluate --resume {directory}/checkpoint.pt".split())
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["metrics"]["final"]


def test_tuning_sees_batches_that_the_dense_run_did_not(run, monkeypatch):
    """The Fisher information is of that run's first batch; then come others."""
    batch, as_dense = Data.train_batch, []

    def record(self, seed, epoch, step, size, **kwargs):
        made = batch(self, seed, epoch, step, size, **kwargs)
        as_dense.append((epoch, step, torch.equal(made.images, batch(self, 0, epoch, step, size).images)))
        return made

    monkeypatch.setattr(Data, "train_batch", record)
    directory = run("--method kron-obd --ratio 0.1 --fisher-samples 128 --max-steps 2")
    assert as_dense == [(0, 0, True), (0, 0, False), (0, 1, False)]
    assert read_json(directory / "result.json")["seed"] == 0


def same(first, second):
    one, other = (checkpoints.load(directory / "checkpoint.pt") for directory in (first, second))
    assert one["architecture"] == other["architecture"]
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    results = [read_json(directory / "result.json") for directory in (first, second)]
    assert results[0]["metrics"] == results[1]["metrics"]


@pytest.mark.parametrize("method", ["kron-obs", "eigendamage"])
def test_rounds_and_their_resumption(method, run):
    """Stopped in the second of two rounds and gone on with: the same network, bit for bit."""
    flags = f"--method {method} --target-ratio 0.3 --rounds 2 --epochs 1 --fisher-samples 128 --fisher empirical --resume auto"
    whole = run(flags, "whole")
    assert read_json(whole / "result.json")["parameters"]["ratio"] == pytest.approx(0.3, abs=0.01)
    log = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line.get("lr")) for line in log] == [(0, None), (1, 1e-3), (2, 1e-3)]
    run(f"{flags} --max-steps 17", "parts")
    same(whole, run(flags, "parts"))


def test_a_signal_in_the_last_step_of_a_round_ends_the_run_before_the_next(run, monkeypatch, tmp_path):
    flags = "--method kron-obs --target-ratio 0.3 --rounds 2 --epochs 1 --fisher-samples 128 --resume auto"
    whole = run(flags, "whole")
    last = checkpoints.load(whole / "checkpoint.pt")["step"] // 2
    batch = Data.train_batch

    def interrupt(self, seed, epoch, step, *args, **kwargs):
        if seed == prune.TUNING_SEED and (epoch, step) == (0, last - 1):
            signal.raise_signal(signal.SIGTERM)
        return batch(self, seed, epoch, step, *args, **kwargs)

    monkeypatch.setattr(Data, "train_batch", interrupt)
    with pytest.raises(SystemExit) as stop:
        run(flags, "parts")
    assert stop.value.code == REQUEUE
    assert checkpoints.load(tmp_path / "parts" / "checkpoint.pt")["step"] == last
    monkeypatch.undo()
    same(whole, run(flags, "parts"))


@pytest.mark.parametrize(
    "row",
    [
        row
        for table in PROGRAM.tables
        for row in table.rows
        if row.script == "prune.py"
        and min(PARAMETERS[tuple(row.id.split("-")[:2])].keys() - {"0"}) in row.id  # the smallest ratio
        and row.id.endswith(("kron-obs", "eigendamage", "separable"))  # the other methods remove channels as kron-obs does
    ],
    ids=lambda row: row.id,
)
def test_the_smallest_budgets_can_be_reached(row):
    config = PruningConfig.parse(row.flags)
    with torch.device("meta"):
        model = build(
            {
                **structure.architecture(config),
                "num_classes": {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200}[config.data],
            }
        )
    prune.check_budget(model, config, count_parameters(model))


def test_ratio_measure_and_fixed_rotations(run):
    directory = run("--method eigendamage --ratio 0.5 --fix-rotation --max-steps 2 --fisher-samples 64 --measure")
    state = checkpoints.load(directory / "checkpoint.pt")
    model = build(state["architecture"])
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert fixed
    assert all(name.rpartition(".")[0].endswith((".0", ".2")) for name in fixed)
    sizes = state["architecture"]["pruned"]["sizes"].values()
    assert sum(map(sum, sizes)) <= 0.55 * 2 * sum(conv.out_channels for conv in convolutions(model).values()) * 2
    measured = read_json(directory / "measure.json")["models"]
    assert measured["as trained"]["parameters"] == read_json(directory / "result.json")["parameters"]["compressed"]
    assert measured["as trained"]["batch1"]["multiply_adds"] < measured["dense"]["batch1"]["multiply_adds"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target-ratio 0.1", "arguments are required: --method"),
        ("--method obd --target-ratio 0.1", "invalid choice: 'obd'"),
        ("--method c-obd", "give exactly one of --target-ratio (parameters to keep)"),
        ("--method c-obd --target-ratio 0.1 --ratio 0.5", "and --ratio (channels to remove)"),
        ("--method c-obd --target-ratio 0", "must be above 0 and at most 1, got 0"),
        ("--method c-obd --ratio 1", "--ratio must be below 1"),
        ("--method c-obd --target-ratio 0.1 --prune-ratio-limit 1", "--prune-ratio-limit must be below 1"),
        ("--method kron-obd --target-ratio 0.1 --fix-rotation", "--fix-rotation is for eigendamage: kron-obd has no rotations"),
        ("--method eigendamage-separable --target-ratio 0.1 --rounds 2", "--rounds above 1 is not for eigendamage-separable"),
        ("--method c-obd --target-ratio 0.001", "a budget of 309 parameters cannot be reached"),
        ("--method eigendamage --target-ratio 0.01", "a budget of 3,086 parameters cannot be reached"),
        ("--method eigendamage-separable --target-ratio 0.5", "this method has at most 76,590"),
        ("--method c-obd --target-ratio 0.001 --dry-run", "a budget of 309 parameters cannot be reached"),
        ("--method c-obd --target-ratio 0.1 --width 64", "has width 32, but the flags ask for 64"),
        ("--method c-obd --target-ratio 0.1 --depth 14", "has depth 8, but the flags ask for 14"),
        ("--method c-obd --target-ratio 0.1 --pretrained nowhere.pt", "there is no checkpoint at nowhere.pt"),
        (
            "--method c-obd --ratio 0.1 --data imagefolder --data-dir nowhere --width 64",
            "has width 32, but the flags ask for 64",
        ),
    ],
)
def test_bad_flags(refuses, tmp_path, dense, flags, message):
    refuses(prune.main, f"{DIGITS} --pretrained {dense}/checkpoint.pt --save-dir {tmp_path}/r {flags}", message)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_pruned(refuses, tmp_path, run):
    refuses(prune.main, f"{DIGITS} --method c-obd --target-ratio 0.5", "--pretrained is missing")
    pruned = run("--method c-obd --ratio 0.2 --max-steps 1 --fisher-samples 32")
    command = f"{DIGITS} --method c-obd --ratio 0.2 --pretrained {pruned}/checkpoint.pt --save-dir {tmp_path}/again"
    refuses(prune.main, command, "is already pruned")


def test_what_cannot_be_gone_on_with(refuses, tmp_path, dense, run):
    """Checkpoints of other runs, of dense networks, and bare weights: one line, and nothing is left behind."""
    command = f"{DIGITS} --method kron-obd --target-ratio 0.3 --fisher-samples 64 --pretrained {dense}/checkpoint.pt"
    pruned = run("--method kron-obd --target-ratio 0.3 --fisher-samples 64 --max-steps 2")
    torch.save(checkpoints.load(dense / "checkpoint.pt")["model"], tmp_path / "bare.pt")
    for source, message in (
        (f"{pruned}/checkpoint.pt --lr 0.5", "lr 0.001 there, 0.5 here"),
        (f"{pruned}/checkpoint.pt --max-steps 1", "at step 2, past the last step 1"),
        (f"{dense}/checkpoint.pt", "is of a dense network: give it as --pretrained"),
        (f"{tmp_path}/bare.pt", "is of a dense network: give it as --pretrained"),
    ):
        refuses(prune.main, f"{command} --save-dir {tmp_path}/x --resume {source}", message)
        assert not (tmp_path / "x").exists()


def test_a_budget_that_only_the_fisher_shows_to_be_out_of_reach_leaves_nothing(refuses, tmp_path, dense):
    command = f"{DIGITS} --method kron-obs --fisher-samples 64 --pretrained {dense}/checkpoint.pt --save-dir {tmp_path}/x"
    refuses(prune.main, f"{command} --prune-ratio-limit 0.5 --target-ratio 0.26", "parameters cannot be reached")
    assert not (tmp_path / "x").exists()


def test_a_diverged_network_is_refused(refuses, tmp_path, dense):
    state = checkpoints.load(dense / "checkpoint.pt")
    state["model"]["layer1.0.conv1.weight"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    command = f"{DIGITS} --method kron-obs --target-ratio 0.5 --pretrained {tmp_path}/nan.pt --save-dir {tmp_path}/r"
    refuses(prune.main, command, "has diverged: layer1.0.conv1.weight is not finite")
    assert not (tmp_path / "r").exists()


def test_what_surgery_adds_is_on_the_models_device():
    model = build(RESNET).to("meta")
    kept = {
        name: list(range(index % 2, conv.out_channels, 2)) for index, (name, conv) in enumerate(convolutions(model).items())
    }
    keep_channels_(model, kept)
    assert any(isinstance(module, UnionAdd) for module in model.modules())
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_defaults_are_eigendamages_recipe():
    args = PruningConfig.parse("--network resnet --method eigendamage --target-ratio 0.1 --pretrained x.pt".split())
    assert (args.epochs, args.lr, args.weight_decay, args.prune_ratio_limit, args.fisher) == (150, 1e-3, 1e-4, 0.95, "true")
