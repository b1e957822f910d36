"""Surgery: what is replaced and what is not, ranks and parameter counts, round trips, and refusals."""

import copy
import math
import random
import re
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from common import (
    FactorizationReport,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    FrobeniusDecay,
    LowRankConfig,
    densify_,
    factorize_,
    load_factorized_,
    rank_scale_for_ratio,
)
from common.budget import closest_index, count_parameters, step_midpoints
from common.experiments.files import ROOT
from common.layers import Factorized
from common.linalg import frobenius_norm, unroll
from resnet_cifar.models import build, is_factorized
from resnet_cifar.rows import PARAMETERS

# The layers here are so small that many have more parameters in factors; the warning of it has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.* layers have more parameters than before")


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, (3, 5), stride=2, padding=(1, 2), bias=False),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


@pytest.mark.parametrize("depth", [2, 3])
def test_full_rank_spectral_initialization_reproduces_the_donor(depth):
    model = small_model().double()
    factorized = copy.deepcopy(model)
    factorize_(factorized, LowRankConfig(2.0, depth=depth))
    assert all(isinstance(factorized[i], Factorized) for i in (0, 2, 4))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(factorized.eval()(x), model.eval()(x), rtol=1e-12, atol=1e-12)


def test_truncated_spectral_initialization_is_the_best_approximation_of_the_unrolled_kernel():
    donor = nn.Conv2d(6, 5, 3, dtype=torch.float64)
    model = nn.Sequential(copy.deepcopy(donor))
    (layer,) = factorize_(model, LowRankConfig(0.3)).layers
    singular_values = torch.linalg.svdvals(unroll(donor.weight.detach()))
    error = torch.linalg.vector_norm(model[0].to_dense() - donor.weight)
    assert layer.rank == round(0.3 * 15) == 4
    torch.testing.assert_close(error, singular_values[4:].square().sum().sqrt())


@pytest.mark.parametrize("depth", [2, 3])
def test_norm_matched_factors_have_the_norm_of_spectral_ones(depth):
    spectral, matched = small_model(), small_model()
    factorize_(spectral, LowRankConfig(0.25, depth=depth))
    factorize_(matched, LowRankConfig(0.25, depth=depth, init="norm-matched"))
    for index in (0, 2, 4):
        torch.testing.assert_close(frobenius_norm(matched[index].factors()), frobenius_norm(spectral[index].factors()))
        assert not torch.allclose(matched[index].to_dense(), spectral[index].to_dense())


def test_initial_norms_are_those_of_the_released_code():
    """64 channels, 3x3, rank 21: ||U V^T||_F is 27.6 for regular and 6.67 for spectral initialization of a Kaiming kernel."""
    norms = {"regular": [], "spectral": []}
    for seed in range(5):
        for init, values in norms.items():
            torch.manual_seed(seed)
            donor = nn.Conv2d(64, 64, 3, bias=False)
            nn.init.kaiming_normal_(donor.weight)
            model = nn.Sequential(donor)
            report = factorize_(model, LowRankConfig(0.111, init=init))
            assert report.layers[0].rank == 21
            values.append(frobenius_norm(model[0].factors()).item())
    assert sum(norms["regular"]) / 5 == pytest.approx(27.6, rel=0.02)
    assert sum(norms["spectral"]) / 5 == pytest.approx(6.67, rel=0.02)


def test_regular_initialization_is_the_one_of_the_layer_and_was_called_kaiming():
    made = []
    for init in ("regular", "kaiming"):
        model = nn.Sequential(nn.Linear(6, 4))
        torch.manual_seed(1)
        factorize_(model, LowRankConfig(0.5, init=init))
        made.append(model[0])
    torch.manual_seed(1)
    alone = FactorizedLinear(6, 4, 2)
    for layer in made:
        for factor, expected in zip(layer.factors(), alone.factors(), strict=True):
            assert torch.equal(factor, expected)


def test_norm_matched_factors_have_the_norm_with_noise_too():
    models = [nn.Sequential(nn.Linear(20, 30)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    factorize_(models[0], LowRankConfig(0.5))
    factorize_(models[1], LowRankConfig(0.5, depth=3, residual=0.3, init="norm-matched"))
    torch.testing.assert_close(frobenius_norm(models[1][0].factors()), frobenius_norm(models[0][0].factors()))


def test_residual_noise_on_the_middle_factor():
    model = nn.Sequential(nn.Linear(200, 200))
    factorize_(model, LowRankConfig(1.0, depth=3, residual=0.01))
    assert (model[0].m.detach() - torch.eye(200)).std() == pytest.approx(0.01, rel=0.05)


def test_a_callable_gives_the_factors():
    def init(matrix, rank):
        return matrix[:, :rank], torch.eye(rank, matrix.shape[1])

    model = nn.Sequential(nn.Linear(6, 4))
    weight = model[0].weight.detach().clone()
    factorize_(model, LowRankConfig(0.5, init=init))
    torch.testing.assert_close(model[0].weight[:, :2], weight[:, :2])
    with pytest.raises(ValueError, match="factors of shapes"):
        factorize_(nn.Sequential(nn.Linear(6, 4)), LowRankConfig(0.5, init=lambda matrix, rank: (matrix, matrix)))


def test_what_a_replaced_layer_keeps_and_that_the_rest_is_untouched():
    model = small_model().bfloat16().eval()
    model[2].weight.requires_grad_(False)
    first, bias = model[0], model[4].bias
    report = factorize_(model, LowRankConfig(0.5), filter_fn=lambda module, name: name != "0")
    assert model[0] is first
    conv, linear = model[2], model[4]
    assert isinstance(conv, FactorizedConv2d)
    assert isinstance(linear, FactorizedLinear)
    assert (conv.stride, conv.padding, conv.kernel_size, conv.bias) == ((2, 2), (1, 2), (3, 5), None)
    assert linear.bias is bias
    assert conv.u.dtype == torch.bfloat16
    assert not conv.u.requires_grad
    assert linear.u.requires_grad
    assert not conv.training
    assert [(layer.name, layer.shape, layer.rank) for layer in report.layers] == [
        ("2", (16, 8, 3, 5), 24),
        ("4", (10, 256), 5),
    ]
    assert report.original == count_parameters(small_model())
    assert report.compressed == count_parameters(model)
    assert "2" in str(report)
    assert report.to_dict()["parameters"]["ratio"] == report.ratio


def test_rank_pattern_overrides_and_zero_keeps_dense():
    model = small_model()
    report = factorize_(model, LowRankConfig(0.5, rank_pattern={r"[02]": 0.25, r"4": 0}))
    assert (model[0].rank, model[2].rank) == (6, 12)
    assert type(model[4]) is nn.Linear
    assert "4: left dense, its rank scale is 0" in str(report)
    report = factorize_(small_model(), LowRankConfig(0, rank_pattern={"0": 0.25}))
    assert [layer.name for layer in report.skipped] == ["2", "4"]
    with pytest.raises(ValueError, match=r"'layer.*' matches none"):
        factorize_(small_model(), LowRankConfig(0.5, rank_pattern={"layer.*": 0.1}))


def test_the_report_of_a_dense_model():
    report = FactorizationReport.dense(small_model())
    assert report == factorize_(small_model(), LowRankConfig(0))
    assert (report.layers, report.original, report.compressed) == ((), 4_730, 4_730)


def test_rank_scale_zero_is_dense():
    report = factorize_(small_model(), LowRankConfig(0))
    assert report.layers == ()
    assert report.ratio == 1


def test_embeddings_lose_their_padding_row_and_share_modules_stay_shared():
    embedding = nn.Embedding(20, 8, padding_idx=3)
    model = nn.ModuleDict({"a": embedding, "b": nn.Sequential(embedding)})
    with torch.no_grad():
        embedding.weight[3] = 1  # a user may have overwritten it; the factorized row is zero by contract
    dense = embedding.weight.detach().clone()
    factorize_(model, LowRankConfig(1.0))
    assert isinstance(model["a"], FactorizedEmbedding)
    assert model["a"] is model["b"][0]
    dense[3] = 0
    torch.testing.assert_close(model["a"].to_dense(), dense)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), "'0': ConvTranspose2d is not"),
        (nn.Sequential(nn.ConvTranspose1d(4, 4, 3)), "'0': ConvTranspose1d is not"),
        (nn.Sequential(nn.Conv3d(4, 4, 3)), "'0': Conv3d is not"),
        (nn.Sequential(nn.EmbeddingBag(4, 4)), "'0': EmbeddingBag is not"),
        (nn.Sequential(nn.Linear(4, 4).to(torch.complex64)), "'0': its weight is torch.complex64, not floating point"),
        (nn.Sequential(Scaled(4, 4)), "'0': Scaled overrides forward"),
        (nn.Sequential(nn.LazyLinear(4)), "has no weight yet"),
        (nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), "parametriz"),
        (nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4))), "'0': a hook computes its weight"),
        (nn.Sequential(prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)), "'0': a hook computes its weight"),
        (nn.Sequential(nn.Embedding(4, 4, sparse=True)), "embedding with sparse"),
        (nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), "embedding with max_norm"),
        (nn.Linear(4, 4), "inside a container"),
        (nn.Sequential(nn.ReLU()), "nothing to factorize"),
    ],
)
def test_refusals_leave_the_model_as_it_was(model, message):
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        factorize_(model, LowRankConfig(0.5))
    assert [type(module) for module in model.modules()] == kinds


def altered(**changes):
    layer = nn.Linear(8, 8)
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


def with_state_dict_hook():
    layer = nn.Linear(8, 8)
    layer.register_state_dict_post_hook(lambda *args: None)
    return layer


def with_weight_hook():
    layer = nn.Linear(8, 8)
    layer.weight.register_hook(lambda grad: grad)
    return layer


def with_accumulation_hook():
    layer = nn.Linear(8, 8)
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return layer


def compiled():
    layer = nn.Linear(8, 8)
    layer.compile(backend="eager")
    return layer


class InList(nn.Module):
    def __init__(self, registered):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8))
        self.taps = [self.body[0] if registered else nn.Linear(8, 8)]


class Nested(nn.Parameter):
    """A weight of another class than Parameter, as sharded and quantized ones are."""


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (altered(forward=lambda x: x), "its forward is overridden on the instance; undo that first"),
        (with_state_dict_hook(), "it has state dict hooks"),
        (with_weight_hook(), "its weight has gradient hooks"),
        (with_accumulation_hook(), "its weight has gradient hooks"),
        (altered(weight=Nested(torch.ones(8, 8))), "its weight is a Nested"),
        (compiled(), "it was compiled by its method compile"),
        (altered(rank=3), "already has an attribute 'rank': rename that of Linear"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(layer, message):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    with pytest.raises(ValueError, match=message):
        factorize_(model, LowRankConfig(0.25))
    assert type(model[0]) is nn.Linear
    assert model[1] is layer


def test_layers_in_a_plain_list_are_refused_by_their_place():
    model = InList(registered=True)
    message = "'body.0': taps.0. holds it outside the registered modules and would keep it; register it"
    with pytest.raises(ValueError, match=message):
        factorize_(model, LowRankConfig(0.25))
    model = InList(registered=False)
    with pytest.raises(ValueError, match=r"'taps\[0\]': it is held outside the registered modules; register it"):
        factorize_(model, LowRankConfig(0.25))
    report = factorize_(model, LowRankConfig(0.25), unsupported="skip")
    assert [layer.name for layer in report.layers] == ["body.0"]
    assert [layer.name for layer in report.skipped] == ["taps[0]"]
    model.taps = {"first": model.body[0]}
    with pytest.raises(ValueError, match=r"cannot fold 'body.0': taps\['first'\] holds it"):
        densify_(model)
    with pytest.raises(ValueError, match=r"cannot load 'body.0': taps\[0\] holds it"):
        load_factorized_(InList(registered=True), model.state_dict())
    model.taps = [model]  # a parent is not replaced
    densify_(model)
    factorize_(model, LowRankConfig(0.25))


def test_attention_in_a_plain_list_is_refused_by_its_place():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    model.taps = (model[0],)
    with pytest.raises(ValueError, match=r"'0.q_proj': taps\[0\] holds it"):
        factorize_(model, LowRankConfig(0.25))
    del model.taps
    factorize_(model, LowRankConfig(0.25))
    model.taps = (model[0],)
    with pytest.raises(ValueError, match=r"cannot fold '0': taps\[0\] holds it"):
        densify_(model)


def test_hooks_attributes_and_what_was_added_move_with_the_layer():
    """Through factorize_ and back through densify_; handles of the hooks keep working."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    layer, calls = model[0], []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: calls.append("before")),
        layer.register_forward_hook(lambda module, args, kwargs, output: calls.append("after"), with_kwargs=True),
        layer.register_full_backward_hook(lambda module, before, after: calls.append("backward")),
    ]
    layer.is_head = True
    layer.register_buffer("mask", torch.ones(8))
    layer.register_buffer("scratch", torch.ones(2), persistent=False)
    layer.gain = nn.Parameter(torch.ones(1))
    layer.inner = nn.Dropout()
    layer.weight.no_decay = True
    x = torch.randn(3, 8, requires_grad=True)
    factorize_(model, LowRankConfig(0.25))
    for _ in range(2):
        calls.clear()
        model(x).sum().backward()
        assert calls == ["before", "after", "backward"]
        assert model[0].is_head
        assert {"0.mask", "0.gain"} <= set(model.state_dict())
        assert "0.scratch" not in model.state_dict()
        assert isinstance(model[0].inner, nn.Dropout)
        parameter = model[0].u if isinstance(model[0], Factorized) else model[0].weight
        assert parameter.no_decay
        rebuilt = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        rebuilt[0].register_buffer("mask", torch.zeros(8))
        rebuilt[0].gain = nn.Parameter(torch.zeros(1))
        load_factorized_(rebuilt, model.state_dict())
        assert rebuilt[0].mask.all()
        if isinstance(model[0], Factorized):
            densify_(model)
    assert type(model[0]) is nn.Linear
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x).sum().backward()
    assert calls == []


def test_what_was_done_to_a_factorized_layer_is_kept_or_refused_by_densify():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    factorize_(model, LowRankConfig(0.25))
    model[0].is_head = True
    model[1].forward = lambda x: x
    with pytest.raises(ValueError, match="cannot fold '1': its forward is overridden on the instance; undo that first"):
        densify_(model)
    assert isinstance(model[0], Factorized)
    del model[1].forward
    densify_(model)
    assert model[0].is_head
    assert not hasattr(model[0], "rank")
    assert vars(model[1]).keys() == vars(nn.Linear(8, 8)).keys()


@pytest.fixture
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrapped_models_are_refused_by_name(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = nn.Sequential(nn.Linear(8, 8))
    wrapped = DistributedDataParallel(model)
    for outer, where in ((wrapped, "the model"), (nn.Sequential(wrapped), "'0'")):
        with pytest.raises(ValueError, match=rf"factorize inside DistributedDataParallel \({where}\): .*; factorize first"):
            factorize_(outer, LowRankConfig(0.25))
        with pytest.raises(ValueError, match="cannot load inside DistributedDataParallel"):
            load_factorized_(outer, {})
    factorize_(model, LowRankConfig(0.25))
    with pytest.raises(ValueError, match="cannot densify inside DistributedDataParallel"):
        densify_(DistributedDataParallel(model))
    sharded = nn.Sequential(nn.Linear(8, 8))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="cannot factorize inside FSDPModule"):
        factorize_(sharded, LowRankConfig(0.25))


def test_an_optimizer_made_before_surgery_says_so_at_its_next_step():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)

    def step(optimizer):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    early = torch.optim.AdamW(model.parameters())
    step(early)
    factorize_(model, LowRankConfig(0.25), filter_fn=lambda module, name: name == "0")
    early.zero_grad()
    model(x).sum().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(
        ValueError, match=r"this AdamW holds 1 Parameters, such as '0.weight', that were replaced .* make it after factorize_"
    ):
        early.step()
    assert all(map(torch.equal, before, model.parameters()))
    between = torch.optim.SGD(model.parameters(), lr=0.1)
    step(between)
    densify_(model)
    with pytest.raises(ValueError, match=r"this SGD holds 2 Parameters, such as '0.u'"):
        step(between)
    step(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("change", [lambda model: factorize_(model, LowRankConfig(0.25)), densify_])
@pytest.mark.parametrize("clear", ["the model", "zeros"])
def test_gradients_from_before_surgery_do_not_hide_such_an_optimizer(change, clear):
    model = nn.Sequential(FactorizedLinear(8, 8, 2), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        if clear == "the model":
            model.zero_grad()  # reaches the new Parameters alone
        else:
            optimizer.zero_grad(set_to_none=False)
        model(torch.ones(3, 8)).sum().backward()
        optimizer.step()

    step()
    change(model)
    with pytest.raises(ValueError, match="that were replaced"):
        step()


def test_a_decay_made_before_surgery_says_so_at_its_next_step():
    model = nn.Sequential(nn.Linear(8, 8))
    factorize_(model, LowRankConfig(0.25))
    decay = FrobeniusDecay(model, 0.1)
    model(torch.ones(2, 8)).sum().backward()
    decay.step()
    model.zero_grad()
    densify_(model)
    with pytest.raises(RuntimeError, match=r"^0 was replaced after this FrobeniusDecay was created"):
        decay.step()


def test_a_replaced_layer_may_be_trained_elsewhere():
    model = nn.Sequential(nn.Linear(8, 8))
    donor = model[0]
    factorize_(model, LowRankConfig(0.25))
    optimizer = torch.optim.SGD(donor.parameters(), lr=0.1)
    donor(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    lazy = torch.optim.LBFGS(donor.parameters(), max_iter=2)
    donor.weight.grad = None

    def closure():
        loss = donor(torch.ones(1, 8)).square().sum()
        loss.backward()
        return loss

    lazy.step(closure)


def test_skipping_what_is_unsupported():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3), Scaled(8, 8), nn.Linear(8, 8))
    expected = [type(module) for module in model]
    report = factorize_(model, LowRankConfig(0.25), unsupported="skip")
    assert [type(module) for module in model] == [FactorizedConv2d, *expected[1:3], FactorizedLinear]
    assert [(layer.name, layer.reason) for layer in report.skipped] == [
        ("1", "ConvTranspose2d is not a Linear, Conv1d, Conv2d, Embedding or MultiheadAttention"),
        ("2", "Scaled overrides forward"),
    ]
    assert "2: left dense, Scaled overrides forward" in str(report).splitlines()
    assert report.to_dict()["skipped"][1] == {"name": "2", "reason": "Scaled overrides forward"}
    with pytest.raises(ValueError, match=r"nothing to factorize .* selected 1 .*; 1 are not supported, such as '0': Scaled"):
        factorize_(nn.Sequential(Scaled(4, 4)), LowRankConfig(0.5), unsupported="skip")
    with pytest.raises(ValueError, match="unsupported must be 'raise' or 'skip', got 'ignore'"):
        factorize_(model, LowRankConfig(0.5), unsupported="ignore")


def growing_model():
    """At half of the rows, factors take 16 * (32 + 8) = 640, 4 * (8 + 32) = 160 and 8 * 2 * (3 + 3) = 96 parameters."""
    depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    return nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.Conv2d(32, 8, 1, bias=False), depthwise)


def test_layers_that_grow_are_warned_of_once_or_left_dense():
    model = growing_model()
    message = (
        "2 of 3 layers have more parameters than before, such as '0', and the model has 1.53 times as many: pass skip_grow"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        report = factorize_(model, LowRankConfig(0.5))
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert [(layer.name, layer.parameters_before, layer.parameters_after) for layer in report.growing] == [
        ("0", 256, 640),
        ("2", 72, 96),
    ]
    assert [line.endswith(" grows") for line in str(report).splitlines()] == [False, True, False, True, True]
    model = growing_model()
    report = factorize_(model, LowRankConfig(0.5), skip_growing=True)
    assert [layer.name for layer in report.layers] == ["1"]
    assert report.compressed == 256 + 4 * 40 + 72
    assert [(layer.name, layer.reason) for layer in report.skipped] == [
        ("0", "rank 16 would need 640 parameters instead of 256"),
        ("2", "rank 2 would need 96 parameters instead of 72"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert factorize_(growing_model(), LowRankConfig(0.5), skip_growing=False).growing
        factorize_(growing_model(), LowRankConfig(0.5, rank_of="min"), filter_fn=lambda module, name: name != "2")


def test_what_a_rank_scale_multiplies():
    ranks = {"released": [8, 2, 1, 2], "min": [2, 2, 1, 2]}
    for rank_of, expected in ranks.items():
        model = growing_model().append(nn.Linear(8, 100))
        report = factorize_(model, LowRankConfig(0.25, rank_of=rank_of), skip_growing=False)
        assert [layer.rank for layer in report.layers] == expected
    with pytest.raises(ValueError, match="rank_of must be 'released' or 'min', got 'max'"):
        LowRankConfig(0.25, rank_of="max")


@pytest.mark.parametrize("skip_growing", [False, True])
@pytest.mark.parametrize("rank_of", ["released", "min"])
@pytest.mark.parametrize("target", [0.3, 0.55, 0.9])
def test_the_scale_for_a_ratio_follows_what_it_multiplies(target, rank_of, skip_growing):
    options = {"filter_fn": lambda module, name: name != "2", "skip_growing": skip_growing}
    scale = rank_scale_for_ratio(growing_model(), target, rank_of=rank_of, **options)

    def ratio(scale):
        return factorize_(growing_model(), LowRankConfig(scale, rank_of=rank_of), **options).ratio

    grid = [ratio(step / 200) for step in range(1, 400)]
    assert abs(ratio(scale) - target) == pytest.approx(min(abs(each - target) for each in grid))
    with pytest.raises(ValueError, match=r"target ratio 1.5 is above 1, but with skip_growing no layer grows"):
        rank_scale_for_ratio(growing_model(), 1.5, skip_growing=True)


def test_attention_that_is_factorized_already_loads_a_state_dict():
    models = [nn.Sequential(nn.MultiheadAttention(8, 2)) for _ in range(2)]
    for model in models:
        factorize_(model, LowRankConfig(0.25))
    report = load_factorized_(models[1], models[0].state_dict())
    assert not report.layers
    for name, value in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], value)


def test_a_path_is_no_state_dict():
    with pytest.raises(TypeError, match=r"got a str: pass torch\.load\(path\)"):
        load_factorized_(nn.Linear(3, 3), "model.pt")
    with pytest.raises(TypeError, match=r"got a Linear: pass its state_dict\(\)"):
        load_factorized_(nn.Linear(3, 3), nn.Linear(3, 3))


def test_the_ratio_that_an_error_names_is_accepted():
    for width in range(5, 30):
        model = nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, 7))
        with pytest.raises(ValueError, match="is below the floor") as caught:
            rank_scale_for_ratio(model, 1e-9)
        ratio = float(str(caught.value).split(" a ratio of ")[1].split(";")[0])
        rank_scale_for_ratio(model, ratio)
    model = nn.Sequential(nn.Linear(2, 25, bias=False), nn.Linear(25, 6, bias=False))
    with pytest.raises(ValueError, match=r"a ratio of 0\.29$"):
        rank_scale_for_ratio(model, 0.1)
    rank_scale_for_ratio(model, 0.29)  # times 200 parameters, that is less than 58 in floating point


def test_the_floor_of_a_ratio_names_no_projection_of_attention():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 5))
    with pytest.raises(ValueError, match=r"is below the floor: .* keeps 24 of them dense"):
        rank_scale_for_ratio(model, 0.01)


def test_no_match_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="of 3 Linear, convolution and Embedding layers filter_fn selected none"):
        factorize_(small_model(), LowRankConfig(0.5), filter_fn=lambda module, name: False)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_scale": -0.1},
        {"rank_scale": float("nan")},
        {"rank_scale": float("inf")},
        {"rank_scale": 0.5, "init": "svd"},
        {"rank_scale": 0.5, "depth": 4},
        {"rank_scale": 0.5, "residual": 0.1},
        {"rank_scale": 0.5, "rank_pattern": {"a": -1}},
        {"rank_scale": 0.5, "rank_pattern": {"(": 1}},
        {"rank_scale": "0.5"},
    ],
)
def test_bad_configurations_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        LowRankConfig(**options)


def golden():
    for depth, counts in PARAMETERS.items():
        for scale, expected in counts.items():
            yield depth, scale, expected


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(("depth", "scale", "expected"), golden())
def test_golden_parameter_counts(depth, scale, expected, classes):
    with torch.device("meta"):
        model = build(f"resnet{depth}", classes)
    expected += 5850 if classes == 100 else 0
    if scale == "0":
        assert count_parameters(model) == expected
        return
    config = LowRankConfig(1.0 if scale == "deep" else float(scale), init="regular", depth=3 if scale == "deep" else 2)
    report = factorize_(model, config, filter_fn=is_factorized)
    assert report.compressed == expected
    assert len(report.layers) == depth - 2


def test_golden_counts_and_ranks_of_resnet20():
    counts = {0.037: 23_482, 0.111: 63_850, 0.333: 188_314, 1.0: 560_026, 3.0: 1_675_162, 9.0: 5_020_570}
    for scale, expected in counts.items():
        model = build("resnet20", 10)
        report = factorize_(model, LowRankConfig(scale, init="regular"), filter_fn=is_factorized)
        assert report.compressed == expected
        if scale == 0.111:
            assert [layer.rank for layer in report.layers] == [5] * 6 + [11] * 6 + [21] * 6
    model = build("resnet20", 10)
    assert factorize_(model, LowRankConfig(1.0, init="regular", depth=3), filter_fn=is_factorized).compressed == 850_330


@pytest.mark.parametrize("sign", [1, -1])
def test_the_closest_index_is_that_of_a_search_through_all(sign):
    """Over rising and falling counts with plateaus: the closest, of equally close neighbors the one before the budget."""
    generator = random.Random(0)
    for _ in range(300):
        low, counts = generator.randint(-3, 3), [0]
        for _ in range(generator.randint(0, 12)):
            counts.append(counts[-1] + generator.choice([0, 0, 1, 2, 5]))
        high = low + len(counts) - 1
        for budget in (generator.uniform(-2, counts[-1] + 2), *range(-1, counts[-1] + 2)):
            asked = []

            def count(index, low=low, counts=counts, asked=asked):
                asked.append(index)
                return sign * counts[index - low]

            found = closest_index(count, low, high, sign * budget)
            assert low <= found <= high
            assert counts[found - low] == min(counts, key=lambda each: (abs(each - budget), each))
            assert len(set(asked)) == len(asked) <= 4 + math.log2(len(counts))
    assert closest_index([3, 3, 5].__getitem__, 0, 2, 4) == 1
    assert closest_index([5, 3, 3].__getitem__, 0, 2, 3) == 1
    assert closest_index([3, 5, 5].__getitem__, 0, 2, 9) == 1
    assert closest_index([7, 7, 7].__getitem__, 0, 2, 9) == 0


def test_no_rank_changes_between_the_neighbors_of_a_midpoint():
    def ranks(scale):
        return [max(1, round(scale * dimension)) for dimension in (7, 12, 30)]

    midpoints = step_midpoints([7, 12, 30, 12], 0, 2.0)
    found = [ranks(scale) for scale in midpoints]
    everything = [ranks(step / 100_000) for step in range(1, 200_000)]
    assert found == [combination for combination, before in zip(everything, [None, *everything]) if combination != before]  # noqa: B905
    assert step_midpoints([7, 12, 30], 1.2, 1.21) == pytest.approx([(1.2 + 14.5 / 12) / 2, (14.5 / 12 + 1.21) / 2])
    assert step_midpoints([1], 0, 1) == [0.5]


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("target", [0.06, 0.1, 0.37, 1.0, 2.5])
def test_the_scale_for_a_ratio_is_the_closest_achievable(depth, target):
    """Against a brute force over a fine grid of scales, each applied for real."""
    with torch.device("meta"):
        model = build("resnet20", 10)
    scale = rank_scale_for_ratio(model, target, filter_fn=is_factorized, depth=depth)

    def ratio(scale):
        config = LowRankConfig(scale, init="regular", depth=depth)
        return factorize_(copy.deepcopy(model), config, filter_fn=is_factorized).ratio

    found = abs(ratio(scale) - target)
    near = [scale * (1 + step / 400) for step in range(-30, 31, 3)]
    assert found <= min(abs(ratio(other) - target) for other in near) + 1e-12


def test_rank_search_is_fast_and_leaves_the_model_alone():
    model = build("resnet110", 10)
    before = [id(parameter) for parameter in model.parameters()]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        rank_scale_for_ratio(model, 0.1, filter_fn=is_factorized)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05
    assert [id(parameter) for parameter in model.parameters()] == before


def test_the_scale_of_a_huge_ratio_is_found_without_going_through_all_below():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    assert round(64 * rank_scale_for_ratio(model, 1e9)) == 32 * 10**9


def test_a_ratio_below_the_floor_names_the_floor():
    with pytest.raises(
        ValueError, match=r"rank 1 everywhere leaves 9,930 of 464,154 parameters, a ratio of 0.021394; 'linear.weight' keeps"
    ):
        rank_scale_for_ratio(build("resnet32", 10), 0.001, filter_fn=is_factorized)
    for target in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive and finite"):
            rank_scale_for_ratio(build("resnet20", 10), target)


def test_ratio_with_fixed_layers():
    model = small_model()
    scale = rank_scale_for_ratio(model, 0.5, rank_pattern={"0": 0, "4": 0.5})
    report = factorize_(model, LowRankConfig(scale, rank_pattern={"0": 0, "4": 0.5}))
    assert [layer.name for layer in report.layers] == ["2", "4"]
    assert report.ratio == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("depth", [2, 3])
def test_densify_changes_no_output(depth):
    torch.manual_seed(0)
    model = build("resnet20", 10)
    factorize_(model, LowRankConfig(0.111, depth=depth), filter_fn=is_factorized)
    x = torch.randn(4, 3, 16, 16)
    model.eval()
    before = model(x)
    names = densify_(model)
    assert len(names) == 18
    assert not any(isinstance(module, Factorized) for module in model.modules())
    assert (model(x) - before).abs().max() < 1e-5
    build("resnet20", 10).load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="nothing to fold"):
        densify_(model)


def test_densify_of_linear_and_embedding():
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 4)).double()
    factorize_(model, LowRankConfig(0.5))
    index = torch.arange(9)
    before = model(index)
    densify_(model)
    assert model[0].padding_idx == 0
    torch.testing.assert_close(model(index), before)


@pytest.mark.parametrize("depth", [2, 3])
def test_a_factorized_model_is_rebuilt_from_its_state_dict_alone(depth):
    model = small_model()
    config = LowRankConfig(0.3, depth=depth, rank_pattern={"4": 0.7})
    factorize_(model, config, filter_fn=lambda module, name: name != "0")
    rebuilt = small_model()
    report = load_factorized_(rebuilt, model.state_dict())
    assert [layer.rank for layer in report.layers] == [model[2].rank, model[4].rank]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(rebuilt.eval()(x), model.eval()(x))


def test_a_module_used_twice_is_rebuilt_as_one():
    def make():
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model, rebuilt = make(), make()
    factorize_(model, LowRankConfig(0.5))
    assert len(load_factorized_(rebuilt, model.state_dict()).layers) == 1
    assert rebuilt[0] is rebuilt[2]
    torch.testing.assert_close(rebuilt(torch.ones(1, 6)), model(torch.ones(1, 6)))


def test_a_state_dict_of_another_architecture_names_the_first_mismatch():
    state = small_model().state_dict()
    model = small_model()
    model[4] = nn.Linear(16 * 4 * 4, 7)
    with pytest.raises(ValueError, match=r"'4.weight' has shape \(10, 256\), expected \(7, 256\)"):
        load_factorized_(model, state)
    with pytest.raises(ValueError, match=r"the checkpoint lacks '0\.bias'"):
        load_factorized_(small_model(), {key: value for key, value in state.items() if key != "0.bias"})
    with pytest.raises(ValueError, match="the model lacks 'extra'"):
        load_factorized_(small_model(), {**state, "extra": torch.zeros(1)})


def train_in_three_lines(model, forward):
    """Run the README's own lines on the model, then its loop."""
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope = {"model": model}
    exec(lines.replace("from fnl import", "from common import"), scope)  # this process has the library under its other name
    decay, optimizer = scope["decay"], scope["optimizer"]
    losses = []
    for _ in range(6):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.01
        loss = forward(model)
        optimizer.zero_grad()
        loss.backward()
        decay.step()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_readme_lines_on_torchvision_resnet18():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    train_in_three_lines(model, lambda model: F.cross_entropy(model(x), y))
    assert type(model.conv1) is nn.Conv2d
    assert isinstance(model.layer4[1].conv2, FactorizedConv2d)
    model.eval()
    with torch.no_grad():
        before = model(x)
        densify_(model)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_readme_lines_on_a_transformer_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x, target = torch.randn(3, 7, 32), torch.randn(3, 7, 32)
    train_in_three_lines(model, lambda model: F.mse_loss(model(x), target))
    assert isinstance(model.layers[0].self_attn.out_proj, FactorizedLinear)
    slow = model(x)
    model.eval()
    torch.testing.assert_close(model(x), slow, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():  # torch's fused path reads .weight of the linear layers
        torch.testing.assert_close(model(x), slow, rtol=1e-4, atol=1e-5)
        mask = torch.zeros(3, 7, dtype=torch.bool)
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), slow, rtol=1e-4, atol=1e-5)


def test_a_rank_scale_in_place_of_a_configuration_is_refused():
    with pytest.raises(TypeError, match=r"takes a LowRankConfig, got 0\.25: pass LowRankConfig\(rank_scale=\.\.\.\)"):
        factorize_(nn.Sequential(nn.Linear(4, 4)), 0.25)


@pytest.mark.parametrize("init", ["spectral", "regular", "norm-matched"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value, init):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    with torch.no_grad():
        model[1][0].weight[1, 2] = value
    before = list(model)
    with pytest.raises(ValueError, match=r"cannot factorize '1\.0': its weight contains NaN or infinite values"):
        factorize_(model, LowRankConfig(0.5, init=init))
    assert list(model) == before


@pytest.mark.parametrize("init", ["spectral", "norm-matched"])
def test_a_spectral_start_of_weights_without_values_is_refused_by_name(init):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"weight of '0': it is on the meta device"):
        factorize_(model, LowRankConfig(0.5, init=init))
    report = factorize_(model, LowRankConfig(0.5, init="regular"))
    assert [layer.rank for layer in report.layers] == [2, 6]
    model.to_empty(device="cpu")


def test_a_model_without_values_gets_those_of_the_state_dict():
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    factorize_(trained, LowRankConfig(0.5))
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    assert len(load_factorized_(model, trained.state_dict()).layers) == 2
    input = torch.randn(2, 3, 4, 4)
    assert torch.equal(model(input), trained(input))
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in model.parameters())
    FrobeniusDecay(model, 0.1).step()


@pytest.mark.parametrize("factorized", [False, True])
def test_tied_weights_of_a_model_without_values_stay_tied(factorized):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.out.weight = self.words.weight

    trained = Tied()
    if factorized:
        factorize_(trained, LowRankConfig(0.5))
    with torch.device("meta"):
        model = Tied()
    load_factorized_(model, trained.state_dict())
    name = "u" if factorized else "weight"
    assert getattr(model.out, name) is getattr(model.words, name)
    assert torch.equal(getattr(model.out, name), getattr(trained.out, name))
