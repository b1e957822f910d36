"""``.weight`` of factorized layers: what code that looks for a weight finds there."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from common import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear, LowRankConfig, factorize_
from tensor_wrn.layers import TensorTrainPointwise

LAYERS = {
    "linear": lambda: FactorizedLinear(6, 5, 2),
    "three factors": lambda: FactorizedLinear(6, 5, 2, depth=3),
    "convolution": lambda: FactorizedConv2d(4, 6, 3, 2),
    "embedding": lambda: FactorizedEmbedding(7, 6, 2),
    "tensor train": lambda: trained(TensorTrainPointwise(8, 8, 0.5)),
}


def trained(layer):
    layer.initialize_("regular")
    return layer


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def test_shape_dtype_and_device_cost_no_product(layer, monkeypatch):
    expected = layer.to_dense()
    monkeypatch.setattr(type(layer), "to_dense", lambda self: pytest.fail("composed"))
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device) == (expected.shape, torch.float64, expected.device)
    assert (weight.size(0), weight.dim(), weight.ndim, weight.numel()) == (
        expected.size(0), expected.dim(), expected.ndim, expected.numel(),
    )  # fmt: skip
    assert weight.requires_grad
    assert weight.is_floating_point()
    assert not weight.is_cuda
    assert len(weight) == len(expected)
    assert not weight.data.requires_grad
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad


def test_what_computes_with_it_gets_the_differentiable_product(layer):
    dense = layer.to_dense()
    assert torch.equal(layer.weight * 1, dense)
    assert torch.equal(torch.cat([layer.weight, layer.weight]), torch.cat([dense, dense]))
    assert torch.equal(layer.weight.detach().clone(), dense)
    assert not layer.weight.detach().clone().requires_grad
    torch.testing.assert_close(layer.weight, dense, rtol=0, atol=0)
    expected = torch.autograd.grad(dense.square().sum(), list(layer.factors()))
    layer.weight.square().sum().backward()
    for factor, grad in zip(layer.factors(), expected, strict=True):
        torch.testing.assert_close(factor.grad, grad)
    assert repr(layer.weight).startswith("tensor(")
    assert layer.weight.detach().numpy().shape == tuple(dense.shape)
    assert torch.equal(copy.deepcopy(layer.weight.detach()), dense)
    assert torch.equal(pickle.loads(pickle.dumps(layer.weight.detach())), dense)
    with torch.no_grad():
        weight = layer.weight
    assert not weight.requires_grad
    assert not (weight * 1).requires_grad


class Shows(nn.Module):
    """A model whose output is a weight."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.weight


CHANGES = {
    "init": lambda layer: nn.init.normal_(layer.weight),
    "xavier": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "kaiming": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "constant": lambda layer: nn.init.constant_(layer.weight, 1.0),
    "data in place": lambda layer: layer.weight.data.mul_(2),
    "data filled": lambda layer: layer.weight.data.fill_(0),
    "data assigned": lambda layer: setattr(layer.weight, "data", torch.zeros(1)),
    "row of data": lambda layer: layer.weight.data[0].zero_(),
    "view": lambda layer: layer.weight.view(-1).zero_(),
    "transposed": lambda layer: layer.weight.T.copy_(torch.zeros(layer.weight.T.shape)),
    "one of several views": lambda layer: layer.weight.unbind()[0].zero_(),
    "among others": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "activation": lambda layer: F.relu(layer.weight, inplace=True),
    "frozen": lambda layer: layer.weight.requires_grad_(False),
    "frozen by attribute": lambda layer: setattr(layer.weight, "requires_grad", False),
    "item": lambda layer: layer.weight.__setitem__(0, 1.0),
    "item of data": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "out": lambda layer: torch.zeros(layer.weight.shape, out=layer.weight),
    "added": lambda layer: layer.weight.__iadd__(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_place_are_refused(change, layer):
    before = [factor.detach().clone() for factor in layer.factors()]
    with torch.no_grad(), pytest.raises(AttributeError, match="is the product of its factors"):
        CHANGES[change](layer)
    assert all(torch.equal(one, other) for one, other in zip(before, layer.factors(), strict=True))
    assert all(factor.requires_grad for factor in layer.factors())


def test_it_is_composed_once_for_each_read_and_keeps_its_gradient(layer, monkeypatch):
    made = []
    compose = type(layer).compose
    monkeypatch.setattr(type(layer), "compose", lambda self, factors: made.append(1) or compose(self, factors))
    weight, seen = layer.weight, []
    weight.retain_grad()
    weight.register_hook(lambda grad: seen.append(grad))
    loss = (weight * 2).sum() + weight.mean()
    assert len(made) == 1
    (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
    torch.testing.assert_close(grad, torch.full_like(grad, 2 + 1 / grad.numel()))
    weight.grad = None
    loss.backward()
    torch.testing.assert_close(weight.grad, grad)
    assert len(seen) == 2
    weight.grad = None
    assert weight.grad is None


def test_a_detached_weight_is_a_snapshot(layer):
    held = layer.weight.detach()
    before = held.clone()
    with torch.no_grad():
        layer.factors()[0].mul_(2)
    assert torch.equal(held, before)
    assert not torch.equal(layer.weight.detach(), before)
    dense = nn.Parameter(layer.weight.detach())
    assert torch.equal(dense, layer.to_dense())
    buffers = nn.Module()
    buffers.register_buffer("w", layer.weight.detach())
    buffers.load_state_dict({"w": before})
    assert torch.equal(buffers.w, before)


def test_factors_that_change_between_reading_and_computing_are_an_error(layer):
    weight = layer.weight
    with torch.no_grad():
        layer.factors()[0].mul_(2)
    with pytest.raises(RuntimeError, match=r"\.weight changed after it was read: read it again"):
        weight.sum()


def test_functions_of_autograd_pass_the_gradient_on(layer):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            ctx.save_for_backward(weight)
            return weight * weight

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    expected = torch.autograd.grad(Square.apply(layer.to_dense()).sum(), layer.factors())
    found = torch.autograd.grad(Square.apply(layer.weight).sum(), layer.factors())
    assert all(map(torch.equal, found, expected))
    torch.utils.checkpoint.checkpoint(Square.apply, layer.weight, use_reentrant=True).sum().backward()
    assert all(torch.equal(factor.grad, grad) for factor, grad in zip(layer.factors(), expected, strict=True))


def test_it_is_differentiated_twice(layer):
    def curvature(weight):
        grads = torch.autograd.grad((weight**3).sum(), layer.factors(), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), layer.factors())

    for one, other in zip(curvature(layer.weight), curvature(layer.to_dense()), strict=True):
        torch.testing.assert_close(one, other)


def test_transforms_of_functions_see_the_product():
    layer = FactorizedLinear(6, 5, 2)
    values = dict(layer.named_parameters())

    def norm(values):
        return torch.func.functional_call(Shows(layer), {f"layer.{name}": value for name, value in values.items()}, ()).sum()

    assert torch.func.grad(norm)(values)["u"].shape == (5, 2)


def test_functional_calls_have_the_weight_of_their_factors():
    model = Shows(FactorizedLinear(6, 5, 2))
    zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    assert not (torch.func.functional_call(model, zeros, ()) * 1).any()


def test_the_usual_initialization_loop_is_refused_and_not_ignored():
    def initialize(module):
        if isinstance(module, nn.Linear) or hasattr(module, "weight"):
            nn.init.xavier_uniform_(module.weight)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    factorize_(model, LowRankConfig(0.5))
    with pytest.raises(AttributeError, match=r"FactorizedLinear\.weight is the product"):
        model.apply(initialize)


def test_functions_that_take_a_weight():
    layer = FactorizedLinear(6, 5, 2).double()
    input = torch.randn(3, 6, dtype=torch.double)
    torch.testing.assert_close(F.linear(input, layer.weight, layer.bias), layer(input))
    assert torch.allclose(layer.weight @ input.T, layer.to_dense() @ input.T)


def test_attention_reads_the_weight_of_a_factorized_projection():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    before = copy.deepcopy(attention)
    factorize_(attention, LowRankConfig(1.0), filter_fn=lambda module, name: name == "out_proj")
    input = torch.randn(2, 3, 8)
    torch.testing.assert_close(attention(input, input, input)[0], before(input, input, input)[0])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_torchs_encoder_layer_uses_the_layers_and_not_a_fast_path(mode):
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    before = copy.deepcopy(encoder)
    factorize_(encoder, LowRankConfig(1.0), filter_fn=lambda module, name: name.startswith("linear"))
    getattr(encoder, mode)(), getattr(before, mode)()
    input = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(encoder(input), before(input))


def test_a_compiled_module_that_reads_the_dtype():
    class Cast(nn.Module):
        """As T5 does before its last projection."""

        def __init__(self):
            super().__init__()
            self.layer = FactorizedLinear(6, 5, 2)

        def forward(self, input):
            return self.layer(input.to(self.layer.weight.dtype)) + self.layer.weight.sum()

    model = Cast()
    input = torch.randn(3, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), model(input))
    exported = torch.export.export(model, (input,))
    torch.testing.assert_close(exported.module()(input), model(input))


def test_a_saved_module_holds_no_product():
    layer = FactorizedLinear(6, 5, 2)
    _ = layer.weight.shape
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded.weight * 1, layer.to_dense())
    assert list(loaded.state_dict()) == ["u", "vt", "bias"]
