"""Kinds of layers that factorize_ replaces: convolutions of one dimension and with groups, transposed linear layers, tied
weights and torch's attention. Each against the ordinary layer and autograd, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from common import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    FrobeniusDecay,
    LowRankConfig,
    densify_,
    factorize_,
    load_factorized_,
    param_groups,
    rank_scale_for_ratio,
)
from common.attention import UnpackedMultiheadAttention
from common.budget import count_parameters
from common.composition import Composition
from common.layers import Factorized, FactorizedTransposedLinear
from common.norms import NormRecorder, NormReplay, norm_metrics

COEF = 0.3
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Conv1D(nn.Module):
    """A linear layer as GPT-2's, with weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Tied(nn.Module):
    """Words in and out by one table, whose padding row is in use by the output."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.middle = nn.Linear(6, 6)
        self.output = nn.Linear(6, 11)
        self.output.weight = self.words.weight
        with torch.no_grad():
            self.words.weight.normal_()

    def forward(self, x):
        index = (x.abs() * 5).long().clamp(0, 10)
        return self.output(self.middle(self.words(index)).tanh())


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.sizes = options.get("kdim", 8), options.get("vdim", 8)

    def forward(self, x):
        key, value = (F.pad(x, (0, size - 8)) for size in self.sizes)
        return self.inner(x, key, value)[0]


SEQUENCE, IMAGE = (2, 6, 9), (2, 6, 7, 8)
KINDS = {
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(6, 5, 3, stride=2, padding=1), nn.Conv1d(5, 4, 2, padding="same")), SEQUENCE),
    "Conv1d, pointwise": (lambda: nn.Sequential(nn.Conv1d(6, 5, 1, stride=2, bias=False)), SEQUENCE),
    "Conv1d, groups": (
        lambda: nn.Sequential(nn.Conv1d(6, 9, 5, dilation=2, groups=3, padding=4, padding_mode="circular")),
        SEQUENCE,
    ),
    "Conv2d, groups": (lambda: nn.Sequential(nn.Conv2d(6, 4, (3, 5), stride=(2, 1), padding=(1, 2), groups=2)), IMAGE),
    "Conv2d, depthwise": (lambda: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)), IMAGE),
    "Conv2d, multiplied": (
        lambda: nn.Sequential(nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 3, 1, groups=3, stride=2)),
        IMAGE,
    ),
    "Conv1D": (lambda: nn.Sequential(Conv1D(7, 9), nn.Tanh(), Conv1D(7, 7)), SEQUENCE),
    "tied": (Tied, (3, 5)),
    "attention": (Attention, (2, 5, 8)),
    "attention of several sizes": (lambda: Attention(kdim=10, vdim=12, add_bias_kv=True), (2, 5, 8)),
    "attention without biases": (lambda: Attention(bias=False, add_zero_attn=True), (2, 5, 8)),
}


def make(kind, seed=0):
    torch.manual_seed(seed)
    build, shape = KINDS[kind]
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, torch.randn(shape, dtype=torch.float64)


def low_rank(scale, **options):
    return LowRankConfig(scale, rank_of="min", **options)


def factorize(model, scale, **options):
    return factorize_(model, low_rank(scale, **options), skip_growing=False)


def distinct(model):
    """The factorized layers, those of tied weights once."""
    return list({id(m.u): m for m in model.modules() if isinstance(m, Factorized)}.values())


def grads(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("contraction", ["thin", "composed"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_the_ordinary_layer_and_folding_gives_it_back(kind, contraction, depth):
    model, x = make(kind)
    expected, types, state = model(x), [type(m) for m in model.modules()], dict(model.state_dict())
    report = factorize(model, 1.0, depth=depth, contraction=contraction)
    assert report.layers
    assert len(distinct(model)) == len(report.layers) - (kind == "tied")
    torch.testing.assert_close(model(x), expected, **EXACT)
    assert report.compressed == count_parameters(model)
    densify_(model)
    torch.testing.assert_close(model(x), expected, **EXACT)
    assert [m for m in map(type, model.modules()) if m is not nn.modules.linear.NonDynamicallyQuantizableLinear] == [
        nn.Linear if t is nn.modules.linear.NonDynamicallyQuantizableLinear else t for t in types
    ]
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], **EXACT)


def dense_gradient(folded, name):
    """The gradient of the weight of a layer in the folded model, where attention is packed."""
    parent, _, own = name.rpartition(".")
    if own not in ("q_proj", "k_proj", "v_proj"):
        return folded.get_submodule(name).weight.grad
    packed = folded.get_submodule(parent)
    if packed.in_proj_weight is None:
        return getattr(packed, f"{own}_weight").grad
    return packed.in_proj_weight.grad.chunk(3)["qkv".index(own[0])]


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("contraction", ["thin", "composed"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_gradients_and_decay_are_those_of_autograd_on_dense_weights(kind, contraction, depth):
    """The folded model gives output and gradients of weights; the chain rule from these to the factors is autograd's."""
    model, x = make(kind)
    factorize(model, 0.4, depth=depth, contraction=contraction)
    folded = copy.deepcopy(model)
    densify_(folded)
    target = torch.randn_like(folded(x))
    torch.testing.assert_close(model(x), folded(x), **EXACT)
    decay = FrobeniusDecay(model, COEF)
    (model(x) * target).sum().backward()
    decay.step()

    (folded(x) * target).sum().backward()
    layers = {name: layer for name, layer in model.named_modules() if layer in distinct(model)}
    penalty = sum(layer.to_dense().square().sum() for layer in layers.values())
    torch.testing.assert_close(decay.penalty(), COEF / 2 * penalty, **EXACT)
    for name, layer in layers.items():
        dense = layer.to_dense()
        upstream = dense_gradient(folded, name) + COEF * dense.detach()
        for factor, grad in zip(layer.factors(), torch.autograd.grad(dense, layer.factors(), upstream), strict=True):
            torch.testing.assert_close(factor.grad, grad, **EXACT)
    for name, parameter in folded.named_parameters():
        if "bias" in name:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, **EXACT)
    groups = param_groups(model, weight_decay=0.1, decay=decay)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tied"])
def test_factor_gradients_against_finite_differences(kind):
    """Not of tied words: through the padding row of the embedding no gradient flows, by its definition."""
    model, x = make(kind)
    factorize(model, 0.4)
    names, values = zip(*model.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(model, dict(zip(names, values, strict=True)), x).square().sum(), values
    )


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_composed_in_groups_as_layer_by_layer(kind, depth):
    model, x = make(kind)
    factorize(model, 0.4, depth=depth, contraction="composed")
    alone = copy.deepcopy(model)
    model(x).square().sum().backward()
    FrobeniusDecay(model, COEF).step()
    composition = Composition(alone, FrobeniusDecay(alone, COEF))
    with composition.active():
        alone(x).square().sum().backward()
    composition.decay_rest()
    assert grads(alone).keys() == grads(model).keys()
    for name, grad in grads(model).items():
        torch.testing.assert_close(grads(alone)[name], grad, **EXACT)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_alone_rebuilds_the_model(kind, depth):
    model, x = make(kind)
    factorize(model, 0.4, depth=depth)
    other, _ = make(kind, seed=1)
    report = load_factorized_(other, model.state_dict())
    assert report.compressed == count_parameters(model)
    assert torch.equal(other(x), model(x)) or (other(x) - model(x)).abs().max() < 1e-12
    copied = copy.deepcopy(model)
    copied.load_state_dict(other.state_dict())
    torch.testing.assert_close(copied(x), model(x), **EXACT)
    assert len(distinct(copied)) == len(distinct(model))


@pytest.mark.parametrize("init", ["regular", "norm-matched", "spectral"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_initialization_gives_finite_factors_that_are_not_zero(kind, init):
    model, _ = make(kind)
    factorize(model, 0.4, init=init)
    for layer in distinct(model):
        assert all(factor.isfinite().all() and factor.any() for factor in layer.factors())


def test_each_group_has_its_own_best_approximation():
    donor = nn.Conv2d(8, 12, 3, groups=4, dtype=torch.float64)
    model = nn.Sequential(copy.deepcopy(donor))
    (row,) = factorize(model, 0.34).layers  # 3 * 3 rows and 2 * 3 columns in each group
    assert (row.rank, model[0].u.shape, model[0].vt.shape) == (2, (4, 9, 2), (4, 2, 6))
    kernel = torch.einsum("gair,grcb->gaicb", model[0].u.view(4, 3, 3, 2), model[0].vt.view(4, 2, 2, 3))
    kernel = kernel.permute(0, 1, 3, 2, 4).reshape(12, 2, 3, 3)  # (group, out, in, row, column)
    torch.testing.assert_close(model[0].to_dense(), kernel)
    for group in range(4):
        matrix = donor.weight[3 * group : 3 * group + 3].detach().permute(0, 2, 1, 3).reshape(9, 6)
        lost = torch.linalg.vector_norm(kernel[3 * group : 3 * group + 3] - donor.weight[3 * group : 3 * group + 3])
        torch.testing.assert_close(lost, torch.linalg.svdvals(matrix)[2:].square().sum().sqrt())


def test_norm_matched_groups_have_the_norms_of_spectral_ones():
    model, _ = make("Conv2d, groups")
    spectral, matched = copy.deepcopy(model), copy.deepcopy(model)
    factorize(spectral, 0.4)
    factorize(matched, 0.4, init="norm-matched")
    norms = [torch.linalg.matrix_norm(layer[0].u @ layer[0].vt) for layer in (spectral, matched)]
    torch.testing.assert_close(*norms)


@pytest.mark.parametrize("depth", [2, 3])
def test_norms_of_groups_are_those_of_the_block_diagonal_matrix(depth):
    model, _ = make("Conv2d, groups")
    factorize(model, 0.7, depth=depth)
    layer = model[0]
    blocks = [torch.block_diag(*factor.detach()) for factor in layer.factors()]
    whole = torch.linalg.multi_dot(blocks)
    found = norm_metrics({"0": layer}, lr=0.1)
    values = torch.linalg.svdvals(whole)
    assert found["frobenius_norm"] == pytest.approx(values.square().sum().sqrt().item())
    assert found["frobenius_norm"] == pytest.approx(torch.linalg.vector_norm(layer.to_dense()).item())
    assert found["nuclear_norm"] == pytest.approx(values.sum().item())
    assert found["nuclear_norm"] <= found["nuclear_norm_bound"]
    gram = [factor.mT @ factor for factor in (blocks[0], blocks[-1].mT)]
    outer = [torch.linalg.vector_norm(g - g.diagonal().diag()) / torch.linalg.vector_norm(g) for g in gram]
    assert found["non_orthogonality"] == pytest.approx(sum(outer).item() / 2)


def test_norms_of_an_ordinary_layer_with_groups_are_those_of_its_factors():
    model, _ = make("Conv2d, groups")
    dense = norm_metrics({"0": model[0]}, lr=0.1)
    factorize(model, 10, init="spectral")  # at full rank the weight is the same
    found = norm_metrics({"0": model[0]}, lr=0.1)
    assert dense == pytest.approx({key: found[key] for key in dense}, rel=1e-5)


def test_recorded_norms_of_groups_are_replayed():
    model, _ = make("Conv2d, groups")
    factorize(model, 0.7)
    layers = {"0": model[0]}
    recorder = NormRecorder(layers)
    recorder.after_step(0)
    record = {**recorder.state_dict(), "path": "norms"}
    torch.testing.assert_close(
        record["norms"].double(), torch.linalg.vector_norm(model[0].to_dense()).view(1, 1), rtol=1e-6, atol=0
    )
    shares = torch.linalg.matrix_norm(model[0].u @ model[0].vt)
    with torch.no_grad():
        model[0].u.mul_(3)
    NormReplay(layers, record, 1, torch.device("cpu")).after_step(0)
    torch.testing.assert_close(torch.linalg.matrix_norm(model[0].u @ model[0].vt), shares, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{"rank_of": "released"}, {"rank_of": "min"}])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_on_shapes_are_those_of_the_model(kind, options):
    model, _ = make(kind)
    scale = rank_scale_for_ratio(model, 0.8, **options)
    found = factorize_(model, LowRankConfig(scale, **options), skip_growing=False)
    best = min(
        (
            factorize_(make(kind)[0], LowRankConfig(each, **options), skip_growing=False).ratio
            for each in (step / 25 for step in range(1, 38))
        ),
        key=lambda ratio: abs(ratio - 0.8),
    )
    assert abs(found.ratio - 0.8) <= abs(best - 0.8) + 1e-12
    if options["rank_of"] == "min":
        copied = factorize_(make(kind)[0], low_rank(1e-6), skip_growing=False)
        assert {layer.rank for layer in copied.layers} == {1}


def test_types_of_the_replacements():
    kinds = {"Conv1d": FactorizedConv1d, "Conv2d, groups": FactorizedConv2d, "Conv1D": FactorizedTransposedLinear}
    for kind, expected in kinds.items():
        model, _ = make(kind)
        factorize(model, 0.5)
        assert isinstance(model[0], expected)
    model, _ = make("attention")
    report = factorize(model, 0.5)
    assert isinstance(model.inner, UnpackedMultiheadAttention)
    assert isinstance(model.inner, nn.MultiheadAttention)
    assert [layer.name for layer in report.layers] == [f"inner.{name}_proj" for name in ("q", "k", "v", "out")]


# Tied weights


def test_tied_layers_share_one_factorization_and_decay_once():
    model, _ = make("tied")
    report = factorize(model, 0.5)
    assert isinstance(model.words, FactorizedEmbedding)
    assert isinstance(model.output, FactorizedLinear)
    assert model.words.u is model.output.u
    assert model.words.vt is model.output.vt
    assert [(layer.name, layer.rank) for layer in report.layers] == [("words", 3), ("output", 3), ("middle", 3)]
    expected = 3 * (11 + 6) + 3 * (6 + 6) + 6 + 11
    assert report.compressed == expected == sum(p.numel() for p in model.parameters())
    assert report.original == 11 * 6 + 6 * 6 + 6 + 11
    densify_(model)
    assert model.words.weight is model.output.weight


def test_tied_layers_are_refused_where_only_one_is_selected_or_they_differ():
    model, _ = make("tied")
    with pytest.raises(ValueError, match="'words': its weight is tied to 'output'; untie it, select both"):
        factorize_(model, low_rank(0.5), filter_fn=lambda module, name: name == "words")
    report = factorize_(model, low_rank(0.5), filter_fn=lambda module, name: name != "output", unsupported="skip")
    assert [layer.name for layer in report.layers] == ["middle"]
    model, _ = make("tied")
    with pytest.raises(ValueError, match="layers that share a weight must have the same rank scale"):
        factorize_(model, low_rank(0.5, rank_pattern={"words": 0.2}))
    crossed = nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4))
    crossed[1].weight = crossed[0].weight
    with pytest.raises(ValueError, match="'0': its weight is tied to '1', which uses it differently"):
        factorize_(crossed, low_rank(0.5))
    assert type(crossed[0]) is nn.Linear


def test_tied_embeddings_alone_keep_their_padding_row_at_zero():
    first, second = (nn.Embedding(7, 5, padding_idx=2) for _ in range(2))
    second.weight = first.weight
    model = nn.Sequential(first, second)
    factorize(model, 1.0)
    assert model[0].u is model[1].u
    assert not model[1](torch.tensor([2])).any()


@pytest.mark.parametrize("other", [None, 4])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("init", ["spectral", "regular"])
def test_a_padding_row_that_another_embedding_uses_is_kept(other, order, init):
    padded, words = nn.Embedding(7, 5, padding_idx=2), nn.Embedding(7, 5, padding_idx=other)
    padded.weight = words.weight
    table, row = words.weight.detach().clone(), torch.tensor([2])
    model = nn.ModuleDict(dict([("padded", padded), ("words", words)][::order]))
    factorize(model, 1.0, init=init)
    if init == "spectral":
        torch.testing.assert_close(model["words"].to_dense().detach(), table)
    assert model["words"](row).any()
    model["padded"](row).sum().backward()  # as in torch, this layer passes no gradient to its padding row
    assert not any(factor.grad.any() for factor in model["padded"].factors())
    model["words"](row).sum().backward()
    assert model["words"].u.grad[2].any()


# torch's attention


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_evaluation_and_with_masks(masked):
    model, x = make("attention")
    options = {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 2)} if masked else {}
    dense = copy.deepcopy(model.inner).eval()
    factorize(model, 1.0)
    for need_weights in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected = dense(x, x, x, need_weights=need_weights, **options)
                found = model.inner.eval()(x, x, x, need_weights=need_weights, **options)
            torch.testing.assert_close(found, expected, **EXACT)


def test_some_projections_of_attention_stay_dense():
    model, x = make("attention")
    expected = model(x)
    factorize_(model, low_rank(1.0), filter_fn=lambda module, name: name.endswith(("q_proj", "k_proj")), skip_growing=False)
    assert isinstance(model.inner.q_proj, FactorizedLinear)
    assert type(model.inner.v_proj) is nn.Linear
    torch.testing.assert_close(model(x), expected, **EXACT)
    again, _ = make("attention", seed=1)
    load_factorized_(again, model.state_dict())
    torch.testing.assert_close(again(x), expected, **EXACT)
    factorize_(model, low_rank(0.5), skip_growing=False, filter_fn=lambda module, name: name.endswith("v_proj"))
    assert isinstance(model.inner.v_proj, FactorizedLinear)
    densify_(model)
    assert type(model.inner) is nn.MultiheadAttention
    untouched, _ = make("attention")
    factorize_(untouched, low_rank(0.5), skip_growing=False, filter_fn=lambda module, name: name.endswith("out_proj"))
    assert type(untouched.inner) is nn.MultiheadAttention


def test_attention_keeps_its_hooks_mode_and_trainability():
    model, x = make("attention")
    seen = []
    model.inner.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    model.inner.label = "first"
    model.inner.in_proj_weight.requires_grad_(False)
    model.inner.eval()
    factorize(model, 0.5)
    assert not any(factor.requires_grad for factor in model.inner.q_proj.factors())
    assert not model.inner.training
    assert not model.inner.q_proj.training
    model(x)
    densify_(model)
    model(x)
    assert seen == [UnpackedMultiheadAttention, nn.MultiheadAttention]
    assert model.inner.label == "first"
    assert not model.inner.in_proj_weight.requires_grad


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 4}])
def test_weights_of_factorized_attention_cannot_be_changed_in_place_without_effect(sizes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2, add_bias_kv=True, **sizes))
    factorize_(model, low_rank(0.5), filter_fn=lambda module, name: not name.endswith("k_proj"))
    attention = model[0]
    name = "q_proj_weight" if sizes else "in_proj_weight"
    weight = getattr(attention, name)
    dense = [attention.q_proj.to_dense(), attention.k_proj.weight, attention.v_proj.to_dense()]
    torch.testing.assert_close(weight.detach(), dense[0] if sizes else torch.cat(dense))
    weight.square().sum().backward()
    grads = [parameter.grad.clone() for parameter in attention.q_proj.parameters()]
    attention.zero_grad()
    attention.q_proj.to_dense().square().sum().backward()
    torch.testing.assert_close(grads, [parameter.grad for parameter in attention.q_proj.parameters()])
    named = "FactorizedLinear.weight" if sizes else "in_proj_weight"
    for change in (
        nn.init.xavier_uniform_,
        lambda weight: weight.data.zero_(),
        lambda weight: weight.detach_().copy_(weight),
        lambda weight: weight[:4].zero_(),
    ):
        with torch.no_grad(), pytest.raises(AttributeError, match=f"^{named} is the product of its factors, and .* would not"):
            change(getattr(attention, name))
    before = {key: value.clone() for key, value in attention.state_dict().items()}
    attention._reset_parameters()
    bound = math.sqrt(6 / (4 * 8 if not sizes else 8 + 6))
    assert 0.8 * bound < attention.k_proj.weight.abs().max() <= bound
    changed = {key for key, value in attention.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"q_proj.u", "q_proj.vt", "k_proj.weight", "v_proj.u", "v_proj.vt", "bias_k", "bias_v"}


def test_attention_is_factorized_again_after_it_was_used_and_folded():
    model, x = nn.Sequential(nn.MultiheadAttention(8, 2)), torch.ones(3, 2, 8)
    for _ in range(2):
        factorize_(model, low_rank(0.5))
        model[0](x, x, x)
        densify_(model)
        assert type(model[0]) is nn.MultiheadAttention


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_attention_that_cannot_be_unpacked_is_refused_by_name():
    one, two = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)
    two.in_proj_weight = one.in_proj_weight
    parametrized = parametrizations.weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight")
    pruned = prune.random_unstructured(nn.MultiheadAttention(4, 2), "in_proj_weight", 0.5)
    for model, message in [
        (nn.ModuleList([OwnForward(4, 2)]), "'0': OwnForward overrides forward"),
        (nn.ModuleList([one, two]), "'0': its weight is tied to '1'"),
        (nn.MultiheadAttention(4, 2), "inside a container"),
        (nn.ModuleList([parametrized]), "'0': its weight is parametrized"),
        (nn.ModuleList([pruned]), "'0': a hook computes its"),
    ]:
        with pytest.raises(ValueError, match=message):
            factorize_(model, low_rank(0.5))
    model = nn.ModuleList([OwnForward(4, 2)])
    report = factorize_(model, low_rank(0.5), unsupported="skip")
    assert [layer.name for layer in report.layers] == ["0.out_proj"]
    assert [(layer.name, layer.reason) for layer in report.skipped] == [("0", "OwnForward overrides forward")]


def test_a_convolution_with_another_convolution_function_is_refused():
    class Standardized(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight / weight.std(), bias)

    with pytest.raises(ValueError, match="'0': Standardized overrides _conv_forward"):
        factorize_(nn.Sequential(Standardized(4, 4, 3)), low_rank(0.5))


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_that_do_not_divide_are_refused(groups):
    with pytest.raises(ValueError, match=f"groups must divide 4 input and 4 output channels, got {groups}"):
        FactorizedConv2d(4, 4, 3, 1, groups=groups)
