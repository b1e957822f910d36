"""Composition in groups: the same functions, gradients and decay as layer by layer, for every kind of layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear, FrobeniusDecay, LowRankConfig, factorize_
from common.composition import Composition, _tf32
from common.contraction import automatic_layers, measure_contractions, set_contractions_
from common.layers import FactorizedConv1d
from resnet_cifar import models
from tensor_wrn.layers import FORMS

COEF = 0.03


class Convolutions(nn.Module):
    """Convolutions of two shapes, one of them twice, one called twice, one of them with bias."""

    def __init__(self, depth):
        super().__init__()
        options = {"depth": depth, "contraction": "composed", "padding": 1}
        self.first = FactorizedConv2d(4, 4, 3, 2, **options)
        self.second = FactorizedConv2d(4, 4, 3, 2, bias=False, **options)
        self.third = FactorizedConv2d(4, 6, (3, 1), 3, depth=depth, contraction="composed")

    def forward(self, input):
        return self.third(self.second(self.first(self.first(input)).relu())).square().mean()


class Words(nn.Module):
    """Embeddings with a padding row, and linear layers; one of each is thin."""

    def __init__(self, depth):
        super().__init__()
        options = {"depth": depth, "contraction": "composed"}
        self.words = FactorizedEmbedding(9, 6, 3, padding_idx=2, **options)
        self.places = FactorizedEmbedding(9, 6, 3, padding_idx=2, depth=depth)
        self.up, self.same = FactorizedLinear(6, 6, 2, **options), FactorizedLinear(6, 6, 2, bias=False, **options)
        self.thin = FactorizedLinear(6, 6, 2, depth=depth, contraction="thin")

    def forward(self, input):
        index = (input[0, 0].abs() * 4).long().clamp(0, 8)
        return self.thin(self.same(self.up(self.words(index) + self.places(index)).tanh())).square().mean()


class Tensors(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.layers = nn.Sequential(*(FORMS[form](8, 8, 3, 0.5, padding=1) for _ in range(2)), FORMS[form](8, 16, 3, 0.5))
        for layer in self.layers:
            layer.pointwise.initialize_("regular")

    def forward(self, input):
        return self.layers(input.repeat(1, 2, 1, 1)).square().mean()


MODELS = {f"{kind.__name__}, depth {depth}": (kind, depth) for kind in (Convolutions, Words) for depth in (2, 3)}
MODELS |= {form: (Tensors, form) for form in FORMS}


def make(name):
    torch.manual_seed(0)
    kind, argument = MODELS[name]
    return kind(argument).double()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_near(found, expected, rtol=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            error = torch.linalg.vector_norm(found[name] - value)
            assert error <= rtol * torch.linalg.vector_norm(value), f"{name}: {error}"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_decay_are_those_of_autograd_layer_by_layer(name, frozen):
    model = make(name)
    if frozen:
        next(model.parameters()).requires_grad_(False)
    alone = copy.deepcopy(model)
    input = torch.randn(2, 4, 8, 8, dtype=torch.double)
    loss = alone(input)
    decay = FrobeniusDecay(alone, COEF)
    penalty = sum(layer.to_dense().square().sum() for layer in decay._layers)
    (loss + COEF / 2 * penalty).backward()
    composition = Composition(model, FrobeniusDecay(model, COEF))
    with composition.active():
        grouped = model(input)
        grouped.backward()
    composition.decay_rest()
    torch.testing.assert_close(grouped, loss, rtol=1e-13, atol=0)
    assert_near(gradients(model), gradients(alone))


def test_a_decay_derived_from_frobenius_decay_makes_its_own_step():
    class Shrink(FrobeniusDecay):
        def step(self, lr=None):
            for factor in self.parameters():
                factor.grad.add_(factor.detach())

    model = make("Convolutions, depth 2")
    alone = copy.deepcopy(model)
    input = torch.randn(2, 4, 8, 8, dtype=torch.double)
    alone(input).backward()
    Shrink(alone, COEF).step()
    composition = Composition(model, Shrink(model, COEF))
    with composition.active():
        model(input).backward()
    composition.decay_rest()
    assert_near(gradients(model), gradients(alone))


@pytest.mark.parametrize("name", MODELS)
def test_without_decay_and_without_gradients(name):
    model = make(name)
    alone = copy.deepcopy(model)
    input = torch.randn(2, 4, 8, 8, dtype=torch.double)
    alone(input).backward()
    composition = Composition(model)
    with composition.active():
        model(input).backward()
    composition.decay_rest()
    assert_near(gradients(model), gradients(alone))
    with torch.no_grad(), composition.active():
        torch.testing.assert_close(model(input), alone(input), rtol=1e-13, atol=0)


def test_layers_of_equal_shapes_are_one_product():
    model = models.build("resnet20", 10)
    factorize_(model, LowRankConfig(0.111, contraction="composed"), filter_fn=models.is_factorized)
    sizes = [len(group.layers) for group in Composition(model, FrobeniusDecay(model, COEF))._groups]
    assert sizes == [6, 1, 5, 1, 5]


def test_layers_that_decay_and_layers_that_do_not_are_two_groups():
    model = Convolutions(2).double()
    decay = FrobeniusDecay(nn.ModuleList([model.second]), COEF)
    assert len(Composition(model, decay)._groups) == 3
    alone = copy.deepcopy(model)
    input = torch.randn(2, 4, 8, 8, dtype=torch.double)
    alone(input).backward()
    FrobeniusDecay(nn.ModuleList([alone.second]), COEF).step()
    composition = Composition(model, decay)
    with composition.active():
        model(input).backward()
    composition.decay_rest()
    assert_near(gradients(model), gradients(alone))


@pytest.mark.parametrize("unused", ["second", "third"])
def test_a_layer_that_the_loss_does_not_reach_still_decays(unused):
    """In a group where others are reached, and as a group of its own."""
    model = Convolutions(2).double()
    alone = copy.deepcopy(model)
    input = torch.randn(2, 4, 8, 8, dtype=torch.double)

    def loss(network):
        hidden = network.first(input)
        return (hidden if unused == "second" else network.second(hidden)).square().mean()

    loss(alone).backward()
    FrobeniusDecay(alone, COEF).step()
    composition = Composition(model, FrobeniusDecay(model, COEF))
    with composition.active():
        loss(model).backward()
    composition.decay_rest()
    expected = {name: grad for name, grad in gradients(alone).items() if grad is not None}
    assert_near({name: grad for name, grad in gradients(model).items() if grad is not None}, expected)


def test_decay_is_multiplied_as_the_loss_is():
    model = Convolutions(2).double()
    alone = copy.deepcopy(model)
    input, scale = torch.randn(2, 4, 8, 8, dtype=torch.double), torch.tensor(1024.0, dtype=torch.double)
    alone(input).backward()
    FrobeniusDecay(alone, COEF).step()
    composition = Composition(model, FrobeniusDecay(model, COEF))
    with composition.active(scale=scale):
        (model(input) * scale).backward()
    composition.decay_rest()
    assert_near({name: grad / scale for name, grad in gradients(model).items()}, gradients(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_decay_survives_gradients_in_half_precision(dtype):
    """Gradients of 1 with a decay of 1e-3 of a weight near 1: their sum in bfloat16 would be 1 again."""
    layer = FactorizedLinear(3, 3, 1, bias=False, contraction="composed")
    nn.init.ones_(layer.u)
    nn.init.ones_(layer.vt)
    composition = Composition(nn.Sequential(layer), FrobeniusDecay(layer, 1e-3))
    with composition.active(dtype):
        assert layer.weight_in_use().dtype == dtype
        layer.weight_in_use().sum().backward()
    composition.decay_rest()
    torch.testing.assert_close(layer.u.grad, torch.full((3, 1), 3 * 1.001), rtol=1e-6, atol=0)


def test_weights_are_forgotten_after_the_block_whatever_happens():
    model = Convolutions(2)
    composition = Composition(model)
    with composition.active():
        assert model.first._composed is not None
    assert model.first._composed is None
    with pytest.raises(RuntimeError), composition.active():
        model(torch.randn(1, 5, 8, 8))
    assert all(layer._composed is None for layer in (model.first, model.second, model.third))


def test_decoupled_decay_is_refused():
    model = Convolutions(2)
    with pytest.raises(ValueError, match="decoupled"):
        Composition(model, FrobeniusDecay(model, COEF, decoupled=True))


@pytest.mark.parametrize("depth", [2, 3])
def test_an_embedding_composed_is_the_same_function_and_keeps_its_padding(depth):
    torch.manual_seed(0)
    thin, composed = (
        FactorizedEmbedding(7, 5, 2, padding_idx=-1, depth=depth, contraction=contraction, dtype=torch.double)
        for contraction in ("auto", "composed")
    )
    composed.set_factors(*thin.factors())
    index = torch.tensor([[0, 6, 3], [3, 3, 6]])
    torch.testing.assert_close(composed(index), thin(index))
    for layer in (thin, composed):
        layer(index).square().sum().backward()
        assert not layer.u.grad[6].any()
    assert_near(gradients(composed), gradients(thin))


def test_contractions_are_measured_once_for_each_kind_of_layer_and_change_nothing():
    model = models.build("resnet20", 10)
    factorize_(model, LowRankConfig(0.111), filter_fn=models.is_factorized)
    before, running = {n: p.clone() for n, p in model.named_parameters()}, model.bn1.running_mean.clone()
    timed = []

    def milliseconds(function):
        function()
        timed.append(function)
        return 2.0 if function.layers[0].contraction == "thin" else 1.0

    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    found = measure_contractions(model, images, milliseconds=milliseconds)
    layers = automatic_layers(model)
    assert len(layers) == 18
    assert sorted(name for each in found for name in each.layers) == sorted(layers)
    assert len(timed) == 2 * len(found) == 10
    assert {each.faster for each in found} == {"composed"}
    assert all(layer.contraction == "thin" for layer in layers.values())  # what the rule chose is not touched
    assert model.training
    assert torch.equal(model.bn1.running_mean, running)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    set_contractions_(model, {name: each.faster for each in found for name in each.layers})
    assert all(layer.contraction == "composed" for layer in layers.values())
    with pytest.raises(ValueError, match="'nowhere'"):
        set_contractions_(model, {"nowhere": "thin"})


class Keywords(nn.Module):
    """A layer that is called with a keyword, and that holds a Parameter of its own."""

    def __init__(self):
        super().__init__()
        self.linear = FactorizedLinear(6, 6, 2)
        self.linear.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.linear(input=x) * self.linear.temperature


def test_contractions_are_measured_of_layers_with_keywords_and_parameters_of_their_own():
    (found,) = measure_contractions(Keywords(), torch.randn(3, 6), milliseconds=lambda function: function() or 1.0)
    assert found.layers == ("linear",)


def test_contractions_that_were_asked_for_are_not_measured():
    model = nn.Sequential(FactorizedConv2d(4, 4, 3, 2, contraction="thin"), FactorizedLinear(3, 3, 1))
    assert list(automatic_layers(model)) == ["1"]


def test_composed_layers_compile():
    """As on a GPU: weights composed outside of the compiled network, which is not compiled again for the next ones."""
    torch.manual_seed(0)
    model = Convolutions(2)
    alone = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    composition = Composition(model, FrobeniusDecay(model, COEF))
    for turn in range(2):
        input = torch.randn(2, 4, 8, 8)
        with composition.active(), torch._dynamo.config.patch(error_on_recompile=bool(turn)):
            compiled(input).backward()
        composition.decay_rest()
        alone(input).backward()
        FrobeniusDecay(alone, COEF).step()
        assert_near(gradients(model), gradients(alone), rtol=1e-4)
        for parameter in (*model.parameters(), *alone.parameters()):
            parameter.grad = None


def test_trained_alike_over_steps():
    torch.manual_seed(0)
    model = models.build("resnet20", 10)
    factorize_(model, LowRankConfig(0.111, contraction="composed"), filter_fn=models.is_factorized)
    model.double()
    alone = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9) for each in (model, alone)]
    composition, decay = Composition(model, FrobeniusDecay(model, COEF)), FrobeniusDecay(alone, COEF)
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.double), torch.arange(4)
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with composition.active():
            F.cross_entropy(model(images), labels).backward()
        composition.decay_rest()
        F.cross_entropy(alone(images), labels).backward()
        decay.step()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.linalg.vector_norm(one - other) <= 1e-10 * torch.linalg.vector_norm(other)


def test_decay_follows_its_coefficient():
    model = Convolutions(2).double()
    alone = copy.deepcopy(model)
    input = torch.randn(2, 4, 8, 8, dtype=torch.double)
    decay = FrobeniusDecay(model, COEF)
    composition = Composition(model, decay)
    decay.coef = 10 * COEF
    alone(input).backward()
    FrobeniusDecay(alone, 10 * COEF).step()
    with composition.active():
        model(input).backward()
    composition.decay_rest()
    assert_near(gradients(model), gradients(alone))


def test_two_backward_passes_before_a_step_are_refused():
    """Gradients would be decayed twice."""
    model = Convolutions(2)
    composition = Composition(model, FrobeniusDecay(model, COEF))
    with composition.active():
        model(torch.randn(2, 4, 8, 8)).backward()
    with pytest.raises(RuntimeError, match="decays once a step"), composition.active():
        pass
    composition.decay_rest()
    with composition.active():
        pass


@pytest.mark.parametrize("kernel", [(3, 3, 3), (4, 3, 2)])
def test_weights_of_three_dimensions(kernel):
    out, channels, size = kernel
    torch.manual_seed(0)
    model = nn.Sequential(*(FactorizedConv1d(channels, out, size, 2, contraction="composed") for _ in range(2))).double()
    alone = copy.deepcopy(model)
    input = torch.randn(2, channels, 9, dtype=torch.double)
    sum(layer(input).square().mean() for layer in alone).backward()
    FrobeniusDecay(alone, COEF).step()
    composition = Composition(model, FrobeniusDecay(model, COEF))
    with composition.active():
        sum(layer(input).square().mean() for layer in model).backward()
    composition.decay_rest()
    assert_near(gradients(model), gradients(alone))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_products_is_put_back(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with _tf32():
            assert torch.get_float32_matmul_precision() == ("high" if precision == "highest" else precision)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
