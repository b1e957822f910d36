"""``.weight`` of factorized layers: what code that looks for a weight finds there."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
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
    assert torch.equal(copy.deepcopy(layer.weight.detach()) * 1, dense)
    assert torch.equal(pickle.loads(pickle.dumps(layer.weight.data)) * 1, dense)


CHANGES = {
    "init": lambda layer: nn.init.normal_(layer.weight),
    "xavier": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "kaiming": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "constant": lambda layer: nn.init.constant_(layer.weight, 1.0),
    "data in place": lambda layer: layer.weight.data.mul_(2),
    "data filled": lambda layer: layer.weight.data.fill_(0),
    "detached in place": lambda layer: layer.weight.detach().add_(1),
    "data assigned": lambda layer: setattr(layer.weight, "data", torch.zeros(1)),
    "gradient assigned": lambda layer: setattr(layer.weight, "grad", torch.zeros(1)),
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
