"""Sparse training: densities, scores and updates against brute force, exact counts at every step, the program end to end."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.experiments import checkpoints
from common.experiments.files import ROOT, read_json
from common.vision.data import Batch, load
from compression_baselines import measure, sparse
from compression_baselines.config import SPARSE, SPARSE_DEFAULTS, SparseConfig
from compression_baselines.masks import METHODS, base, deepr, dsr, grasp, rigl, snip, synflow
from compression_baselines.masks import set as set_method
from compression_baselines.masks.base import Masks, Settings, allocate, largest_remainder, random_subset, top_global


@pytest.fixture
def two():
    """A network of two layers, batches for it, and how to compute its loss from a vector of weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    batches = [Batch(torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.randint(0, 4, (5,))) for _ in range(2)]
    return model, batches


def flat_loss(model, batches, temperature=1.0):
    """The summed loss as a function of all maskable weights in one vector, and that vector."""
    names = [f"{name}.weight" for name in base.weights_of(model)]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    vector = torch.cat([parameters[name].flatten() for name in names])

    def loss(v):
        parts = v.split([parameters[name].numel() for name in names])
        given = parameters | {name: part.view_as(parameters[name]) for name, part in zip(names, parts, strict=True)}
        outputs = [torch.func.functional_call(model, given, (batch.images,)) / temperature for batch in batches]
        return sum(F.cross_entropy(out, batch.labels) for out, batch in zip(outputs, batches, strict=True))

    return loss, vector


def flat(scores):
    return torch.cat([score.flatten() for score in scores.values()])


def test_snip_scores_by_autograd_and_finite_differences(two):
    model, batches = two
    loss, vector = flat_loss(model, batches)
    found = flat(snip.scores(model, batches))
    torch.testing.assert_close(found, (vector * torch.func.grad(loss)(vector)).abs())
    for index in range(0, len(vector), 7):  # the loss as the weight is scaled by c, differentiated at c = 1
        step = torch.zeros_like(vector)
        step[index] = 1e-6 * vector[index]
        assert found[index] == pytest.approx(((loss(vector + step) - loss(vector - step)) / 2e-6).abs().item(), abs=1e-7)


def test_grasp_scores_by_the_whole_hessian_and_finite_differences(two):
    model, batches = two
    loss, vector = flat_loss(model, batches, temperature=2.0)
    gradient, hessian = torch.func.grad(loss)(vector), torch.func.hessian(loss)(vector)
    found = flat(grasp.scores(model, batches, temperature=2.0))
    torch.testing.assert_close(found, vector * (hessian @ gradient))
    for index in range(0, len(vector), 7):  # how the squared norm of the gradient changes as the weight shrinks
        step = torch.zeros_like(vector)
        step[index] = 1e-5 * vector[index]
        norms = [torch.func.grad(loss)(vector + sign * step).square().sum() for sign in (-1, 1)]
        assert found[index] == pytest.approx(((norms[1] - norms[0]) / 4e-5).item(), abs=1e-6)


def test_synflow_scores_are_the_sums_over_paths():
    """For two linear layers: |w2_ki w1_ij| summed over the other indices; their sums are the same in both layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    one, other = model[0].weight, model[1].weight
    found = synflow.scores(model, torch.ones(1, 3, dtype=torch.float64))
    torch.testing.assert_close(found["0"], one * other.sum(0)[:, None])
    torch.testing.assert_close(found["1"], other * one.sum(1))
    torch.testing.assert_close(found["0"].sum(), found["1"].sum())


def masks_of(sizes=((4, 5), (3, 4)), density=0.4, **options):
    """Two masked linear layers with random weights at random masks, with momentum, and a method's settings."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size[1], size[0]) for size in sizes))
    masks = Masks(model)
    masks.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    masks.optimizer.step()
    nonzero = round(density * sum(math.prod(size) for size in sizes))
    given = Settings(nonzero=nonzero, steps=100, steps_per_epoch=10, epochs=10, seed=3, **options)
    base.RandomStart(masks, given).start(model, [])
    return masks, given


def test_outside_a_mask_weight_and_momentum_are_zero():
    masks, _ = masks_of()
    assert masks.nonzero() == round(0.4 * 32)
    for name in masks.layers:
        outside = ~masks.mask(name)
        momentum = masks.optimizer.state[masks.parameter(name)]["momentum_buffer"]
        assert not masks.parameter(name)[outside].any()
        assert not momentum[outside].any()
        assert momentum[~outside].all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
    st.floats(0, 1),
    st.sampled_from(["uniform", "erk"]),
)
def test_allocations_are_exact_within_bounds_and_as_even_as_they_say(sizes, share, distribution):
    named = {str(index): size for index, size in enumerate(sizes)}
    full = {name: math.prod(size) for name, size in named.items()}
    total = len(full) + round(share * (sum(full.values()) - len(full)))
    counts = allocate(named, total, distribution)
    assert sum(counts.values()) == total
    assert all(1 <= counts[name] <= full[name] for name in full)
    free = [name for name in counts if 1 < counts[name] < full[name]]
    wish = {name: sum(named[name]) if distribution == "erk" else full[name] for name in free}
    for one in free:
        for other in free:
            assert abs(counts[one] / wish[one] - counts[other] / wish[other]) <= 3 / wish[one] + 3 / wish[other]


def test_erk_is_dense_where_its_share_exceeds_a_layer():
    counts = allocate({"small": (2, 2), "large": (100, 100)}, 1000, "erk")
    assert counts == {"small": 4, "large": 996}


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="5 weights cannot be distributed over 2 layers of 4"):
        largest_remainder({"a": 1.0, "b": 1.0}, 5, {"a": 2, "b": 2})


def test_the_global_choice_is_exact_and_empties_no_layer(capsys):
    scores = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([0.1, 0.3, 0.2])}
    masks = top_global(scores, 3)
    assert masks["a"].tolist() == [True, True, False, False]
    assert masks["b"].tolist() == [False, True, False]
    assert "layers that would be empty keep their best weight: b" in capsys.readouterr().err
    equal = top_global({"a": torch.zeros(5), "b": torch.zeros(5)}, 4)
    assert sum(int(mask.sum()) for mask in equal.values()) == 4
    with pytest.raises(ValueError, match="scores are NaN"):
        top_global({"a": torch.tensor([float("nan"), 1.0])}, 1)


def test_set_drops_the_closest_to_zero_of_either_sign_and_grows_elsewhere():
    masks, given = masks_of(((10, 20), (10, 10)), 0.3, update_every=1, update_until=1.0, drop_fraction=0.3)
    method = set_method.Set(masks, given)
    before = {name: (masks.mask(name).clone(), masks.parameter(name).detach().clone()) for name in masks.layers}
    method.after_step(4)
    for name, (mask, weight) in before.items():
        dropped = set()  # by sorting each sign on its own
        for sign in (1, -1):
            inside = [index for index in range(weight.numel()) if mask.flatten()[index]]
            signed = [(sign * weight.flatten()[index].item(), index) for index in inside]
            values = sorted((value, index) for value, index in signed if value > 0 or (value == 0 and sign == 1))
            dropped |= {index for _, index in values[: int(0.3 * len(values))]}
        kept = {i for i in range(weight.numel()) if mask.flatten()[i]} - dropped
        now = set(masks.mask(name).flatten().nonzero()[:, 0].tolist())
        assert kept <= now
        assert len(now) == int(mask.sum())
        grown = now - kept
        assert len(grown) == len(dropped) > 0
        assert not any(masks.parameter(name).flatten()[i] for i in grown)
        assert all(masks.parameter(name).flatten()[i] == weight.flatten()[i] for i in kept)
    masks.assign({"0": torch.ones_like(masks.mask("0"))})
    with torch.no_grad():
        masks.parameter("0").normal_()
    whole = masks.parameter("0").detach().clone()
    method.after_step(4)
    assert torch.equal(masks.parameter("0"), whole)  # a layer without room stays as it is


def test_rigl_drops_and_grows_as_brute_force_does():
    torch.manual_seed(2)
    weight, gradient = torch.randn(6, 7), torch.randn(6, 7)
    mask = torch.rand(6, 7) < 0.4
    weight *= mask
    kept, grown = rigl.drop_and_grow(weight, gradient, mask, 5)
    inside = sorted((abs(weight.flatten()[i].item()), i) for i in range(42) if mask.flatten()[i])
    stay = {i for _, i in inside[5:]}
    outside = sorted((-abs(gradient.flatten()[i].item()), i) for i in range(42) if i not in stay)
    assert set(kept.flatten().nonzero()[:, 0].tolist()) == stay
    assert set(grown.flatten().nonzero()[:, 0].tolist()) == {i for _, i in outside[:5]}


def test_rigl_grows_by_the_dense_gradient_and_makes_no_update_then():
    masks, given = masks_of(((8, 9), (7, 8)), 0.3, update_every=10, update_until=0.5, drop_fraction=0.5)
    method = rigl.Rigl(masks, given)
    assert [method.fraction(step) for step in (-1, 24, 49)] == pytest.approx([0.5, 0.25, 0.0])
    x = torch.randn(4, 9)
    weights = {name: (masks.parameter(name) * masks.mask(name)).detach().requires_grad_() for name in masks.layers}
    biases = [layer.bias.detach() for layer in masks.layers.values()]
    out = F.linear(F.linear(x, weights["0"], biases[0]), weights["1"], biases[1])
    dense = torch.autograd.grad(out.square().sum(), list(weights.values()))
    before = {name: masks.mask(name).clone() for name in masks.layers}
    held = {name: masks.parameter(name).detach().clone() for name in masks.layers}
    masks.optimizer.zero_grad()
    masks.model(x).square().sum().backward()
    method.before_update(8)  # not due
    assert all(torch.equal(masks.mask(name), mask) for name, mask in before.items())
    method.before_update(9)
    masks.optimizer.step()
    for (name, mask), gradient in zip(before.items(), dense, strict=True):
        count = int(method.fraction(9) * int(mask.sum()))
        kept, grown = rigl.drop_and_grow(held[name], gradient, mask, count)
        assert count > 0
        assert torch.equal(masks.mask(name), kept | grown)
        both = mask & masks.mask(name)
        assert torch.equal(masks.parameter(name)[both], held[name][both])  # no update
        assert not masks.parameter(name)[~both].any()


def test_deepr_replaces_what_crosses_zero():
    masks, given = masks_of(((10, 20), (10, 10)), 0.3, l1=0.0, temperature=0.0)
    method = deepr.Deepr(masks, given)
    method.start(masks.model, [])
    with torch.no_grad():
        flipped = {name: masks.mask(name) & (torch.rand(masks.mask(name).shape) < 0.5) for name in masks.layers}
        for name, where in flipped.items():
            masks.parameter(name)[where] *= -1
    before = {name: (masks.mask(name).clone(), masks.parameter(name).detach().clone()) for name in masks.layers}
    method.after_step(0)
    for name, (mask, weight) in before.items():
        stayed = mask & ~flipped[name]
        assert (masks.mask(name) & stayed).sum() == stayed.sum()
        assert torch.equal(masks.parameter(name)[stayed], weight[stayed])
        assert masks.mask(name).sum() == mask.sum()
        assert not masks.parameter(name)[~stayed].any()


def test_deepr_walks_and_decays():
    masks, given = masks_of(((200, 200),), 0.5, l1=0.5, temperature=0.02)
    method = deepr.Deepr(masks, given)
    method.start(masks.model, [])
    with torch.no_grad():
        masks.parameter("0").copy_(10 * method.signs["0"] * masks.mask("0"))  # far from zero: none crosses
    method.after_step(0)
    change = (masks.parameter("0") - 10 * method.signs["0"])[masks.mask("0")] * method.signs["0"][masks.mask("0")]
    assert change.mean().item() == pytest.approx(-0.1 * 0.5, abs=2e-3)
    assert change.std().item() == pytest.approx(math.sqrt(2 * 0.1 * 0.02), rel=0.02)


def test_dsr_prunes_by_a_common_threshold_that_adapts_and_regrows_in_proportion():
    masks, given = masks_of(((10, 20), (10, 10)), 0.3, update_every=1, update_until=1.0, drop_fraction=0.2)
    method = dsr.Dsr(masks, given)
    weights = flat({name: weight for name, weight in masks.weights().items()}).abs()
    method.threshold = weights[weights > 0].median().item()
    threshold = method.threshold
    kept = {name: int((masks.weights()[name].abs() >= threshold).sum()) for name in masks.layers}
    method.after_step(0)
    dropped = given.nonzero - sum(kept.values())
    assert dropped == pytest.approx(given.nonzero / 2, abs=1)
    assert method.threshold == threshold / 2  # a half is more than the fifth that was wanted
    assert masks.nonzero() == given.nonzero
    for name in masks.layers:
        share = dropped * kept[name] / sum(kept.values())
        assert int(masks.mask(name).sum()) - kept[name] == pytest.approx(share, abs=1)
    method.threshold = 0.0
    method.after_step(1)
    assert method.threshold == 0.0  # nothing dropped: it would double
    method.threshold = 1e9
    method.after_step(2)
    assert masks.nonzero() == given.nonzero
    assert all(masks.mask(name).any() for name in masks.layers)


def by_rank(scores, count):
    """Positions (layer, index) of the highest scores, by sorting in Python."""
    entries = [(value, name, index) for name, score in scores.items() for index, value in enumerate(score.flatten().tolist())]
    return {(name, index) for _, name, index in sorted(entries, reverse=True)[:count]}


def positions(masks):
    return {(name, index) for name in masks.layers for index in masks.mask(name).flatten().nonzero()[:, 0].tolist()}


@pytest.mark.parametrize(("name", "module"), [("snip", snip), ("grasp", grasp)])
def test_one_shot_methods_keep_the_highest_scores(two, name, module):
    model, batches = two
    wanted = by_rank(module.scores(copy.deepcopy(model), batches), 30)
    masks = Masks(copy.deepcopy(model))
    METHODS[name](masks, Settings(nonzero=30, steps=10, steps_per_epoch=5, epochs=2)).start(model, batches)
    assert positions(masks) == wanted


def test_synflow_prunes_absolute_weights_in_a_hundred_steps(two):
    """Against the same steps on a chain of matrices, with the flow through each weight as products of path sums."""
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in ((6, 8), (8, 7), (7, 3)))).double()
    weights = [layer.weight.detach().abs() for layer in model]
    full, wanted = sum(weight.numel() for weight in weights), 20
    for step in range(1, 101):
        into = [torch.ones(6, dtype=torch.float64)]
        for weight in weights:
            into.append(weight @ into[-1])
        out_of = [torch.ones(3, dtype=torch.float64)]
        for weight in reversed(weights):
            out_of.append(weight.mT @ out_of[-1])
        flow = {str(i): weights[i] * torch.outer(out_of[2 - i], into[i]) for i in range(3)}
        kept = by_rank(flow, round(full * (wanted / full) ** (step / 100)))
        for i, weight in enumerate(weights):
            inside = torch.zeros(weight.numel(), dtype=torch.bool)
            inside[[index for name, index in kept if name == str(i)]] = True
            weight *= inside.view_as(weight)
    masks = Masks(copy.deepcopy(model))
    batch = Batch(torch.randn(2, 6, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    METHODS["synflow"](masks, Settings(nonzero=wanted, steps=10, steps_per_epoch=5, epochs=2)).start(model, [batch])
    assert positions(masks) == kept


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_magnitude_keeps_the_largest(distribution):
    masks, given = masks_of(update_every=10, update_until=0.5, distribution=distribution)
    masks.assign({name: torch.ones_like(masks.mask(name)) for name in masks.layers})
    with torch.no_grad():
        for name in masks.layers:
            masks.parameter(name).normal_(std=1.0 if name == "0" else 0.1)
    magnitudes = {name: weight.abs().clone() for name, weight in masks.weights().items()}
    METHODS["magnitude"](masks, given).after_step(given.last_update - 1)
    if distribution == "global":
        wanted = by_rank(magnitudes, given.nonzero)
        assert {name for name, _ in wanted} == {"0"}  # so that the other layer keeps its best weight alone
        wanted = by_rank({"0": magnitudes["0"]}, given.nonzero - 1) | by_rank({"1": magnitudes["1"]}, 1)
    else:
        counts = allocate(masks.sizes(), given.nonzero, "uniform")
        wanted = set().union(*(by_rank({name: magnitudes[name]}, count) for name, count in counts.items()))
    assert positions(masks) == wanted


def test_lottery_removes_the_smallest_by_equal_factors():
    masks, given = masks_of(((20, 30), (10, 20)), distribution="global", rounds=3, rewind=0)
    given = dataclasses.replace(given, nonzero=80, epochs=10)
    masks.assign({name: torch.ones_like(masks.mask(name)) for name in masks.layers})
    method = METHODS["lottery"](masks, given)
    for epoch, count in ((0, 800), (10, round(800 * 0.1**0.5)), (20, 80)):
        with torch.no_grad():
            for name in masks.layers:
                masks.parameter(name).normal_().mul_(masks.mask(name))
        magnitudes = {name: weight.abs().clone() for name, weight in masks.weights().items()}
        method.before_epoch(epoch)
        assert positions(masks) == by_rank(magnitudes, count)


def test_no_layer_is_emptied_by_making_room_for_another():
    masks = top_global({"a": torch.tensor([9.0, 8.0]), "b": torch.tensor([7.0]), "c": torch.tensor([1.0])}, 3)
    assert [mask.tolist() for mask in masks.values()] == [[True, False], [True], [True]]


PROCESSES = """
import torch, torch.distributed as dist
from torch import nn
from compression_baselines.masks import rigl
from compression_baselines.masks.base import Masks, Settings
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8, bias=False))
masks = Masks(model)
masks.assign({"0": torch.arange(48).view(8, 6) % 3 == rank})
assert torch.equal(masks.mask("0"), torch.arange(48).view(8, 6) % 3 == 0), "the main process's masks count"
masks.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
method = rigl.Rigl(masks, Settings(nonzero=16, steps=9, steps_per_epoch=9, epochs=1, update_every=1, drop_fraction=0.5))
model(torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
mine = model[0].weight.grad.clone()
total = mine.clone()
dist.all_reduce(total)
kept, grown = rigl.drop_and_grow(masks.weights()["0"].clone(), total, masks.mask("0"), int(method.fraction(0) * 16))
method.before_update(0)
assert torch.equal(masks.mask("0"), kept | grown), "both processes grow by the sum of their gradients"
print("agreed")
"""


def test_processes_agree_on_masks(tmp_path):
    script = tmp_path / "agree.py"
    script.write_text(PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=240)
    assert (done.returncode, done.stdout.count("agreed")) == (0, 2), done.stderr


def test_hooks_act_between_backward_and_the_update(run, monkeypatch):
    seen = []

    class Watched(METHODS["snip"]):
        def snapshot(self, kind):
            weights = {name: weight.clone() for name, weight in self.masks.weights().items()}
            gradients = [self.masks.parameter(name).grad for name in self.masks.layers]
            seen.append((kind, weights, all(gradient is not None and gradient.any() for gradient in gradients)))

        def before_update(self, step):
            self.snapshot("before")

        def after_step(self, step):
            self.snapshot("after")

    monkeypatch.setitem(METHODS, "snip", Watched)
    run("--method snip --target-ratio 0.3 --max-steps 2")
    assert [kind for kind, _, _ in seen] == ["before", "after"] * 2
    (_, first, gradients), (_, second, _), (_, third, _), _ = seen
    assert gradients
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_scores_come_from_ten_images_a_class():
    data = load("digits", None)
    for flags, count in (("--batch-size 30", 4), ("--batch-size 128", 1), ("--batch-size 30 --score-batches 2", 2)):
        args = SparseConfig.parse(f"--network resnet --dataset digits --method snip --target-ratio 0.1 {flags}".split())
        batches = sparse.first_batches(args, data)
        assert len(batches) == count
        assert torch.equal(batches[-1].images, data.train_batch(0, 0, count - 1, args.batch_size).images)


def test_the_magnitude_schedule_is_cubic():
    masks, given = masks_of(update_every=10, update_until=0.5, distribution="uniform")
    method = METHODS["magnitude"](masks, given)
    full = 32
    for step in range(50):
        left = 1 - (step + 1) / 50
        assert method.wanted(step) == given.nonzero + int((full - given.nonzero) * left**3)
    assert method.wanted(49) == given.nonzero
    assert method.best_from() == 4  # the epoch whose end has the last change behind it


def test_random_subsets_are_drawn_evenly():
    candidates = torch.tensor([True, False, True, True, False, True])
    counts = torch.zeros(6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        drawn = random_subset(candidates, 2, generator)
        assert drawn.sum() == 2
        counts += drawn
    assert not counts[~candidates].any()
    assert counts[candidates].min() > 160


DIGITS = "--network resnet --depth 8 --width 32 --dataset digits --image-size 8 --batch-size 128 --device cpu --lr 0.05"
FULL = 308_650  # parameters of that network
EXTRA = {"lottery": "--rounds 2", "magnitude": "--update-every 3", "rigl": "--update-every 3", "dsr": "--update-every 3"}


@pytest.fixture
def run(tmp_path, capsys):
    def start(flags, directory="r"):
        sparse.main(f"{DIGITS} --save-dir {tmp_path}/{directory} {flags}".split())
        return Path(capsys.readouterr().out.strip()).parent

    return start


def log_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", SPARSE)
def test_every_method_end_to_end(method, run, monkeypatch, capsys):
    """Exact density at every step, a resumed run equal to the whole one bit for bit, and evaluation from the checkpoint."""
    epochs = 1 if method == "lottery" else 2
    flags = f"--method {method} --target-ratio 0.1 --epochs {epochs} --resume auto {EXTRA.get(method, '')}"
    counts = []
    original = METHODS[method].after_step

    def after_step(self, step):
        original(self, step)
        counts.append(self.masks.nonzero())

    monkeypatch.setattr(METHODS[method], "after_step", after_step)
    whole = run(flags, "whole")
    result = read_json(whole / "result.json")
    wanted = round(0.1 * FULL)
    assert result["parameters"] == {"original": FULL, "compressed": wanted, "ratio": wanted / FULL, "nonzero": wanted}
    state = checkpoints.load(whole / "checkpoint.pt")["model"]
    assert counts[-1] == sum(int(value.sum()) for name, value in state.items() if name.endswith("_mask"))
    dense = FULL - sum(value.numel() for name, value in state.items() if name.endswith("_mask"))
    if method == "lottery":
        assert counts == [FULL - dense] * 12 + [wanted - dense] * 12
    elif method == "magnitude":
        assert counts[-6:] == [wanted - dense] * 6
        assert counts == sorted(counts, reverse=True)
    else:
        assert set(counts) == {wanted - dense}
    assert log_of(whole)[-1]["nonzero"] == wanted

    run(f"{flags} --max-steps 15", "parts")
    parts = run(flags, "parts")
    one, other = (checkpoints.load(directory / "checkpoint.pt")["model"] for directory in (whole, parts))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert read_json(parts / "result.json")["metrics"] == result["metrics"]

    sparse.main(f"--dataset digits --image-size 8 --method {method} --evaluate --resume {whole}/checkpoint.pt".split())
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["metrics"]["final"]


def test_the_lottery_rewinds_weights_and_momentum(run, monkeypatch):
    states = []
    lottery = METHODS["lottery"]
    original = lottery.before_epoch

    def before_epoch(self, epoch):
        original(self, epoch)
        state = {name: value.clone() for name, value in self.masks.model.state_dict().items()}
        states.append((state, len(self.masks.optimizer.state)))

    monkeypatch.setattr(lottery, "before_epoch", before_epoch)
    directory = run("--method lottery --target-ratio 0.1 --rounds 2 --epochs 2 --rewind 1")
    (_, (early, before), (rewound, after), _) = states
    assert before > 0
    assert after == 0
    for name, value in rewound.items():
        if name.endswith("_orig"):
            assert torch.equal(value, early[name] * rewound[name.replace("_orig", "_mask")])
        elif not name.endswith("_mask"):
            assert torch.equal(value, early[name]), name
    result = read_json(directory / "result.json")["metrics"]
    assert result["best"] == max(line["test_accuracy"] for line in log_of(directory)[3:])  # of the last round alone


def test_the_ratio_that_an_error_names_is_accepted(capsys):
    """And a ratio below it is not."""
    for flags in ("--network resnet --width 32", "--network resnet --depth 14", "--network vgg"):
        with pytest.raises(SystemExit):
            sparse.main(f"{flags} --method snip --target-ratio 1e-9 --dry-run".split())
        ratio = float(capsys.readouterr().err.split("a ratio of ")[1].split()[0])
        sparse.main(f"{flags} --method snip --target-ratio {ratio:g} --dry-run".split())
        parameters = json.loads(capsys.readouterr().out)["parameters"]
        assert parameters["compressed"] == round(ratio * parameters["original"])
        with pytest.raises(SystemExit):
            sparse.main(f"{flags} --method snip --target-ratio {ratio - 2e-6:g} --dry-run".split())
        capsys.readouterr()


def test_measure_counts_zeros_and_their_indices(run, capsys):
    directory = run("--method snip --target-ratio 0.1 --max-steps 1 --measure")
    costs = read_json(directory / "measure.json")["models"]
    assert costs["as trained"]["parameters"] == costs["dense"]["parameters"] == FULL
    assert costs["as trained"]["nonzero"] <= round(0.1 * FULL)
    assert costs["as trained"]["index_bits"] > 0
    assert costs["as trained"]["batch1"]["multiply_adds"] == costs["dense"]["batch1"]["multiply_adds"]  # a mask saves none
    capsys.readouterr()
    measure.main([str(directory / "checkpoint.pt"), "--image-size", "8"])
    assert json.loads(capsys.readouterr().out)["models"]["as trained"]["nonzero"] == costs["as trained"]["nonzero"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target-ratio 0.1", "arguments are required: --method"),
        ("--method snap --target-ratio 0.1", "invalid choice: 'snap'"),
        ("--method snip", "--target-ratio is missing"),
        ("--method snip --target-ratio 1.5", "must be above 0 and at most 1, got 1.5"),
        ("--method snip --target-ratio 0.001", "normalizations and biases have 1,354 of the 308,650 parameters"),
        ("--method snip --target-ratio 0.1 --drop-fraction 0.2", "--drop-fraction is for set, dsr, rigl: snip does not use it"),
        ("--method rigl --target-ratio 0.1 --distribution global", "--distribution global is for magnitude and lottery"),
        ("--method lottery --target-ratio 0.1 --rounds 1", "--rounds must be at least 2 for lottery"),
        (
            "--method lottery --target-ratio 0.1 --epochs 2 --rewind 2",
            "--rewind must be an epoch of the first round",
        ),
        ("--method rigl --target-ratio 0.1 --compile", "compiled code would not see the masks change"),
    ],
)
def test_bad_flags(refuses, tmp_path, flags, message):
    refuses(sparse.main, f"{DIGITS} --save-dir {tmp_path}/r {flags}", message)
    assert list(tmp_path.iterdir()) == []


def test_defaults_are_the_recipe_of_dense_training():
    args = SparseConfig.parse("--network resnet --method rigl --target-ratio 0.1".split())
    assert (args.epochs, args.lr, args.weight_decay, args.batch_size) == (200, 0.1, 1e-4, 128)
    assert (args.distribution, args.update_every, args.update_until, args.drop_fraction) == ("erk", 100, 0.75, 0.3)
    assert args.rounds is None
    assert set(SPARSE_DEFAULTS) == set(SPARSE) == set(METHODS)
