"""Factorized layers against the ordinary functions on their dense weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from common import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear
from common.layers import Factorized

CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "stride": (3, 2), "padding": (1, 0)},
    {"kernel_size": (1, 3), "stride": 2},
    {"kernel_size": (3, 1), "stride": 3, "padding": (1, 0)},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": (3, 1), "padding": (1, 0)},
    {"kernel_size": (1, 3), "padding": (0, 1), "stride": (1, 2)},
    {"kernel_size": (3, 5), "padding": (2, 1), "stride": (2, 3), "dilation": (1, 2)},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("contraction", ["thin", "composed"])
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("channels_in", "channels_out"), [(3, 8), (8, 3)])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution_equals_conv2d_with_the_dense_kernel(options, channels_in, channels_out, bias, depth, contraction):
    torch.manual_seed(0)
    layer = FactorizedConv2d(
        channels_in, channels_out, rank=4, bias=bias, depth=depth, contraction=contraction, dtype=torch.float64, **options
    )
    if depth == 3:
        nn.init.normal_(layer.m)
    if bias:
        nn.init.normal_(layer.bias)
    reference = nn.Conv2d(channels_in, channels_out, bias=bias, dtype=torch.float64, **options)
    with torch.no_grad():
        reference.weight.copy_(layer.to_dense())
        if bias:
            reference.bias.copy_(layer.bias)
    x = torch.randn(2, channels_in, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(x))
    if options.get("padding_mode", "zeros") == "zeros":
        positional = [options.get("stride", 1), options.get("padding", 0), options.get("dilation", 1)]
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.to_dense(), layer.bias, *positional))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_convolution_gradients():
    layer = FactorizedConv2d(2, 3, 3, rank=2, stride=2, padding=1, dtype=torch.float64)
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(forward, (x, *values))


def test_strided_pointwise_layers_train_at_small_ranks():
    """Their convolutions are not strided: oneDNN's would write past its workspace (a crash, or wrong gradients, on a CPU)."""
    torch.manual_seed(0)
    layer = FactorizedConv2d(20, 14, 1, rank=12, stride=2, bias=False)
    x = torch.randn(29, 20, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    for _ in range(5):
        layer(x).square().sum().backward()
    exact = x.detach().double().requires_grad_()
    dense = layer.to_dense().detach().double()
    F.conv2d(exact, dense, stride=2).square().sum().backward()
    torch.testing.assert_close(x.grad.double() / 5, exact.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("contraction", ["thin", "composed"])
@pytest.mark.parametrize(("channels", "groups", "kernel"), [((8, 8), 8, 7), ((4, 2), 2, (3, 1)), ((6, 12), 3, 3)])
def test_grouped_convolution_of_channels_last_input(channels, groups, kernel, contraction, depth):
    """torch's own would read a kernel that is not contiguous wrongly there, without an error."""
    torch.manual_seed(0)
    layer = FactorizedConv2d(*channels, kernel, rank=2, padding="same", groups=groups, contraction=contraction, depth=depth)
    x = torch.randn(2, channels[0], 9, 8)
    exact = F.conv2d(x.double(), layer.to_dense().double(), layer.bias.double(), padding="same", groups=groups)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(exact)
    found = torch.autograd.grad(layer(x), [x, *layer.factors()], weight.float())
    alone = copy.deepcopy(layer).double()
    wide = x.detach().double().contiguous().requires_grad_()
    output = F.conv2d(wide, alone.to_dense(), alone.bias, padding="same", groups=groups)
    for one, two in zip(found, torch.autograd.grad(output, [wide, *alone.factors()], weight), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("channels", "stride", "rank", "expected"),
    [((64, 64), 1, 20, "thin"), ((64, 64), 1, 95, "thin"), ((64, 64), 1, 96, "composed"), ((64, 128), 2, 160, "composed")],
)
def test_contraction_follows_multiply_adds(channels, stride, rank, expected):
    """At (64, 64), 3x3, stride 1: thin costs rank * 384 per position against 36,864, so they cross at rank 96."""
    assert FactorizedConv2d(*channels, 3, rank=rank, stride=stride).contraction == expected


@pytest.mark.parametrize("contraction", ["thin", "composed"])
@pytest.mark.parametrize("depth", [2, 3])
def test_linear_equals_the_dense_product(depth, contraction):
    layer = FactorizedLinear(5, 7, 3, depth=depth, contraction=contraction, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.to_dense(), layer.bias))
    assert layer.to_dense().shape == (7, 5)


def test_linear_agrees_with_a_parametrization():
    """torch's own parametrize is the oracle: same function, same gradients of the factors."""

    class Product(nn.Module):
        def forward(self, u, vt):
            return u @ vt

        def right_inverse(self, weight):
            return layer.u.detach().clone(), layer.vt.detach().clone()

    layer = FactorizedLinear(5, 7, 3, dtype=torch.float64)
    oracle = nn.Linear(5, 7, dtype=torch.float64)
    parametrize.register_parametrization(oracle, "weight", Product(), unsafe=True)
    with torch.no_grad():
        oracle.bias.copy_(layer.bias)
    x = torch.randn(4, 5, dtype=torch.float64)
    for module in (layer, oracle):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer(x), oracle(x))
    torch.testing.assert_close(layer.u.grad, oracle.parametrizations.weight.original0.grad)
    torch.testing.assert_close(layer.vt.grad, oracle.parametrizations.weight.original1.grad)


@pytest.mark.parametrize("depth", [2, 3])
def test_embedding_equals_the_dense_table_and_keeps_its_padding_row_zero(depth):
    layer = FactorizedEmbedding(10, 6, 3, padding_idx=-1, depth=depth)
    index = torch.tensor([[0, 9, 3], [9, 9, 1]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(index).square().sum().backward()
        optimizer.step()
    assert (layer(index)[index == 9] == 0).all()
    assert (layer.u[9] == 0).all()
    torch.testing.assert_close(layer(index), F.embedding(index, layer.to_dense()))


def test_weight_reads_as_dense_and_cannot_be_assigned():
    layer = FactorizedLinear(5, 7, 3)
    torch.testing.assert_close(layer.weight, layer.u @ layer.vt)
    for value in (torch.zeros(7, 5), nn.Parameter(torch.zeros(7, 5))):
        with pytest.raises(AttributeError, match="densify_"):
            layer.weight = value
    assert set(layer.state_dict()) == {"u", "vt", "bias"}


def test_layers_copy_and_change_dtype():
    layer = copy.deepcopy(FactorizedConv2d(3, 4, 3, rank=2)).double()
    assert layer(torch.zeros(1, 3, 5, 5, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FactorizedLinear(3, 3, 0), "rank must be at least 1, got 0"),
        (lambda: FactorizedLinear(3, 3, 1, depth=4), "depth must be 2"),
        (lambda: FactorizedLinear(3, 3, 1, contraction="fast"), "got 'fast'"),
        (lambda: FactorizedEmbedding(3, 3, 1, padding_idx=3), "padding_idx must be one of the 3 rows, got 3"),
        (lambda: FactorizedConv2d(3, 3, 3, 1, padding="full"), "got 'full'"),
        (lambda: FactorizedConv2d(3, 3, 3, 1, stride=2, padding="same"), "at stride"),
        (lambda: FactorizedConv2d(3, 3, 3, 1, padding_mode="mirror"), "got 'mirror'"),
    ],
)
def test_impossible_layers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_set_factors_checks_shapes():
    with pytest.raises(ValueError, match=r"\(7, 3\)"):
        FactorizedLinear(5, 7, 3).set_factors(torch.zeros(7, 2), torch.zeros(2, 5))


@pytest.mark.parametrize("depth", [2, 3])
def test_the_matrices_of_a_layer_multiply_to_its_unrolled_weight(depth):
    layer = FactorizedConv2d(3, 4, (2, 5), 6, depth=depth, dtype=torch.float64)
    product = torch.linalg.multi_dot(layer.matrices())
    expected = layer.to_dense().transpose(1, 2).flatten(2).flatten(0, 1)  # rows (out, kernel row), columns (in, kernel column)
    torch.testing.assert_close(product, expected)
    assert layer.matrices() == layer.chain() == layer.factors()


def test_a_weight_that_is_no_product_of_matrices_is_one_matrix():
    class Sum(Factorized):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(4, 3, 2, 5, dtype=torch.float64)) for _ in range(2))

        def factors(self):
            return self.a, self.b

        def to_dense(self):
            return self.a + self.b

    layer = Sum()
    (matrix,) = layer.matrices()
    assert layer.chain() == ()
    for out, row, channel, column in [(0, 0, 0, 0), (3, 1, 2, 4), (2, 0, 1, 3)]:
        assert matrix[out * 2 + row, channel * 5 + column] == (layer.a + layer.b)[out, channel, row, column]
