"""Frobenius decay against autograd of the penalty on dense products, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from common import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear, FactorPair, FrobeniusDecay, densify_, param_groups
from common.layers import Factorized
from common.linalg import roll


class Kronecker(Factorized):
    """A factorized layer of another kind, with no closed form of its own."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def factors(self):
        return (self.a, self.b)

    def to_dense(self):
        return torch.kron(self.a, self.b)


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        FactorizedLinear(5, 7, 3),
        FactorizedLinear(5, 7, 3),
        FactorizedLinear(5, 7, 3, depth=3),
        FactorizedConv2d(3, 4, 3, 6),
        FactorizedConv2d(2, 2, 3, 30),  # overcomplete
        FactorizedEmbedding(9, 4, 2, padding_idx=0),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
    ).double()
    model.append(Kronecker())
    return model


def dense_penalty(model):
    """1/2 sum ||W||_F^2 written out layer by layer, with none of the code under test."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in model:
        if isinstance(layer, Kronecker):
            weight = torch.kron(layer.a, layer.b)
        elif isinstance(layer, Factorized):
            middle = layer.m if layer.depth == 3 else torch.eye(layer.rank, dtype=torch.float64)
            weight = layer.u @ middle @ layer.vt
        else:
            continue
        total = total + weight.square().sum() / 2
    return total


def test_step_adds_the_gradient_of_the_penalty():
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    decay = FrobeniusDecay(model, 0.3)
    decay.step()
    penalty = 0.3 * dense_penalty(model)
    expected = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    for parameter, old, new in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(parameter.grad, old if new is None else old + new, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(decay.penalty(), penalty)


def test_decay_may_be_added_to_given_updates():
    """Those of Parameters that are frozen or not given stay as they are, and so do all gradients."""
    model = make_model()
    model[0].u.requires_grad_(False)
    penalty = 0.3 * dense_penalty(model)
    given = {parameter: torch.randn_like(parameter) for parameter in model.parameters() if parameter is not model[1].vt}
    before = {parameter: update.clone() for parameter, update in given.items()}
    trained = [parameter for parameter in given if parameter.requires_grad]
    expected = dict(zip(trained, torch.autograd.grad(penalty, trained, allow_unused=True), strict=True))
    FrobeniusDecay(model, 0.3).add_to(given)
    for parameter, update in given.items():
        new = expected.get(parameter)
        torch.testing.assert_close(update, before[parameter] if new is None else before[parameter] + new)
        assert parameter.grad is None
    assert model[1].vt.grad is None


def test_missing_gradients_are_made_and_frozen_factors_left_alone():
    model = nn.Sequential(FactorizedLinear(4, 4, 2), FactorizedLinear(4, 4, 2))
    model[1].u.requires_grad_(False)
    FrobeniusDecay(model, 0.1).step()
    assert model[0].u.grad is not None
    assert model[1].vt.grad is not None
    assert model[1].u.grad is None
    assert model[0].bias.grad is None
    other = Kronecker()
    other.a.requires_grad_(False)
    FrobeniusDecay(nn.Sequential(other), 0.1).step()
    assert other.a.grad is None
    torch.testing.assert_close(other.b.grad, 0.1 * other.a.square().sum() * other.b)


def test_frozen_factors_keep_the_gradient_that_they_have():
    layer = FactorizedLinear(4, 4, 2, dtype=torch.float64)
    layer.u.grad, layer.vt.grad = torch.ones_like(layer.u), torch.ones_like(layer.vt)
    layer.u.requires_grad_(False)
    FrobeniusDecay(nn.Sequential(layer), 0.1).step()
    assert (layer.u.grad == 1).all()
    torch.testing.assert_close(layer.vt.grad, 1 + 0.1 * layer.u.T @ layer.u @ layer.vt)


class Chain(Factorized):
    """A layer of its own kind whose weight is a plain product of three matrices."""

    def __init__(self):
        super().__init__()
        shapes = [(6, 2), (2, 3), (3, 5)]
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes)

    def factors(self):
        return tuple(self.parts)

    def chain(self):
        return self.factors()

    def to_dense(self):
        return self.parts[0] @ self.parts[1] @ self.parts[2]


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("kind", [Chain, Kronecker])
def test_layers_of_any_kind_are_decayed_by_what_they_say_of_themselves(kind, decoupled):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), kind())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    penalty = sum(layer.to_dense().square().sum() / 2 for layer in model)
    gradients = torch.autograd.grad(penalty, list(model.parameters()))
    decay = FrobeniusDecay(model, 0.5, decoupled=decoupled)
    torch.testing.assert_close(decay.penalty(), 0.5 * penalty)
    decay.step(lr=0.1 if decoupled else None)
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(
            parameter if decoupled else parameter.grad, old - 0.05 * gradient if decoupled else 0.5 * gradient
        )


def test_half_precision_accumulates_in_float32():
    """1/2 ||W||^2 of entries near 300 overflows float16 but its gradient, times the coefficient, does not."""
    layer = FactorizedLinear(64, 64, 8, dtype=torch.float16)
    with torch.no_grad():
        layer.u.fill_(8)
        layer.vt.fill_(8)
    decay = FrobeniusDecay(nn.Sequential(layer), 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        decay.step()
    u, vt = layer.u.double(), layer.vt.double()
    torch.testing.assert_close(layer.u.grad.double(), 1e-4 * u @ vt @ vt.T, rtol=1e-3, atol=0)


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01, dtype=torch.float64)])
def test_decoupled_decay_changes_weights_and_not_gradients(lr):
    model, reference = make_model(), make_model()
    decay = FrobeniusDecay(model, 0.3, decoupled=True)
    decay.step(lr)
    gradients = torch.autograd.grad(dense_penalty(reference), list(reference.parameters()), allow_unused=True)
    for new, old, gradient in zip(model.parameters(), reference.parameters(), gradients, strict=True):
        assert new.grad is None
        torch.testing.assert_close(new, old if gradient is None else old - 0.01 * 0.3 * gradient)
    with pytest.raises(ValueError, match="needs step"):
        decay.step()
    with pytest.raises(ValueError, match="decoupled"):
        FrobeniusDecay(model, 0.3).step(lr=0.1)


def heads_first(heads):
    return lambda q, k: (q.view(heads, -1, q.shape[1]).mT, k.view(heads, -1, k.shape[1]))


def test_factor_pairs_decay_each_head():
    q, k = (nn.Parameter(torch.randn(6, 8, dtype=torch.float64)) for _ in range(2))
    q.grad = torch.ones_like(q)
    pair = FactorPair("qk", q, k, heads_first(2))
    decay = FrobeniusDecay(nn.Identity(), 0.5, pairs=[pair])
    penalty = sum((q[h * 3 : h * 3 + 3].T @ k[h * 3 : h * 3 + 3]).square().sum() for h in range(2)) * 0.5 / 2
    torch.testing.assert_close(decay.penalty(), penalty)
    decay.step()
    dq, dk = torch.autograd.grad(penalty, (q, k))
    torch.testing.assert_close(q.grad, 1 + dq)
    torch.testing.assert_close(k.grad, dk)


def test_a_pair_may_be_two_slices_of_one_packed_parameter():
    attention = nn.MultiheadAttention(8, 2, bias=False, dtype=torch.float64)
    packed = attention.in_proj_weight
    pair = FactorPair("qk", packed, packed, lambda u, vt: (u[:8].view(2, 4, 8).mT, vt[8:16].view(2, 4, 8)))
    FrobeniusDecay(attention, 0.5, pairs=[pair]).step()
    q, k = packed.detach()[:8].view(2, 4, 8), packed.detach()[8:16].view(2, 4, 8)
    torch.testing.assert_close(packed.grad[:8].view(2, 4, 8), 0.5 * k @ k.mT @ q)
    torch.testing.assert_close(packed.grad[8:16].view(2, 4, 8), 0.5 * q @ q.mT @ k)
    assert (packed.grad[16:] == 0).all()


def test_bad_pairs_are_refused():
    q = nn.Parameter(torch.randn(6, 8))
    with pytest.raises(ValueError, match="'qk' copies"):
        FactorPair("qk", q, q, lambda u, vt: (u.repeat(2, 1, 1), vt[None]))
    with pytest.raises(ValueError, match="repeats memory"):
        FactorPair("qk", q, q, lambda u, vt: (u.view(2, 3, 8).mT, vt.view(2, 3, 8)[:1].expand(2, 3, 8)))
    with pytest.raises(ValueError, match=r"\(heads, m, r\)"):
        FactorPair("qk", q, q, lambda u, vt: (u[None], vt[None]))


@pytest.mark.parametrize("coef", [-1.0, float("nan"), float("inf")])
def test_bad_coefficients_are_refused(coef):
    with pytest.raises(ValueError, match="finite and not negative"):
        FrobeniusDecay(nn.Sequential(FactorizedLinear(2, 2, 1)), coef)


def test_nothing_to_decay_is_refused():
    with pytest.raises(ValueError, match="nothing to decay"):
        FrobeniusDecay(nn.Linear(2, 2), 0.1)


def names(model, parameters):
    lookup = {id(parameter): name for name, parameter in model.named_parameters()}
    return {lookup[id(parameter)] for parameter in parameters}


def test_param_groups_are_disjoint_complete_and_by_type():
    model = make_model()
    decay = FrobeniusDecay(model, 0.1)
    rest, factors = param_groups(model, weight_decay=0.2, decay=decay)
    assert names(model, rest["params"]) | names(model, factors["params"]) == {n for n, _ in model.named_parameters()}
    assert not names(model, rest["params"]) & names(model, factors["params"])
    assert names(model, factors["params"]) == names(model, decay.parameters())
    assert "0.bias" in names(model, rest["params"])
    assert "2.m" in names(model, factors["params"])
    assert (rest["weight_decay"], factors["weight_decay"]) == (0.2, 0.0)


def test_param_groups_without_decay():
    model = make_model()
    (everything,) = param_groups(model, weight_decay=0.2)
    assert len(everything["params"]) == len(list(model.parameters()))
    rest, factors = param_groups(model, weight_decay=0.2, factor_weight_decay=0.02)
    assert (rest["weight_decay"], factors["weight_decay"]) == (0.2, 0.02)
    assert "8.a" in names(model, factors["params"])
    with pytest.raises(ValueError, match="not negative"):
        param_groups(model, weight_decay=-1)


def test_convolution_decay_is_that_of_the_kernel():
    """The unrolling only permutes entries: the decay acts on ||kernel||_F."""
    layer = FactorizedConv2d(3, 4, (3, 2), 5, dtype=torch.float64)
    kernel = roll(layer.u @ layer.vt, (3, 2))
    penalty = FrobeniusDecay(nn.Sequential(layer), 1.0).penalty()
    torch.testing.assert_close(penalty, kernel.square().sum() / 2)


@pytest.mark.parametrize("decoupled", [False, True])
def test_factors_that_change_their_rank_are_decayed_as_they_are(decoupled):
    """Layers of equal shapes share a batch; it is made of the factors that the layers have at each step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(FactorizedLinear(5, 5, 3, dtype=torch.float64) for _ in range(2)))
    decay = FrobeniusDecay(model, 0.3, decoupled=decoupled)
    for layer in model:
        layer.bias = None
    for factor, size in ((model[0].u, (5, 1)), (model[0].vt, (1, 5))):
        factor.data = torch.randn(size, dtype=torch.float64)
    penalty = 0.15 * sum(layer.to_dense().square().sum() for layer in model)
    torch.testing.assert_close(decay.penalty(), penalty)
    expected = torch.autograd.grad(penalty, list(model.parameters()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    decay.step(*([0.1] if decoupled else []))
    for parameter, grad, value in zip(model.parameters(), expected, before, strict=True):
        found = (value - parameter.detach()) / 0.1 if decoupled else parameter.grad
        torch.testing.assert_close(found, grad)


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(FactorizedLinear(4, 4, 2), FactorizedConv2d(3, 4, 3, 2), Chain())

    def layer(self):
        return self.net[0]


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def given_memory(model):
    model.to_empty(device="cpu")


def parametrized(model):
    parametrize.register_parametrization(model.layer(), "u", nn.Softplus())


def pruned(model):
    prune.l1_unstructured(model.layer(), "vt", amount=0.5)


def exchanged(model):
    model.net[0] = nn.Linear(4, 4)


def exchanged_around_it(model):
    model.net = nn.Sequential(FactorizedLinear(4, 4, 2))


def one_of_a_list(model):
    model.net[2].parts[1] = nn.Parameter(torch.randn(2, 3))


REPLACED = {
    assigned: "net.0.u",
    given_memory: "net.0.u",
    parametrized: "net.0.u",
    pruned: "net.0.vt",
    exchanged: "net.0",
    exchanged_around_it: "net",
    one_of_a_list: "net.2.parts.1",
}


@pytest.mark.parametrize("replace", REPLACED)
def test_decay_of_parameters_that_were_replaced_is_an_error_by_name(replace):
    model = Wrapper().to("meta" if replace is given_memory else "cpu")
    decay = FrobeniusDecay(model, 0.1)
    groups = param_groups(model, weight_decay=0.1, decay=decay)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    replace(model)
    for use in (decay.step, lambda: param_groups(model, weight_decay=0.1, decay=decay)):
        with pytest.raises(RuntimeError, match=f"^{REPLACED[replace]} was replaced after this FrobeniusDecay was created"):
            use()
    if replace in (assigned, given_memory):
        FrobeniusDecay(model, 0.1).step()


def test_decay_after_folding_is_an_error():
    model = nn.Sequential(FactorizedLinear(4, 4, 2), nn.Linear(4, 4))
    decay = FrobeniusDecay(model, 0.1)
    densify_(model)
    with pytest.raises(RuntimeError, match=r"^0 was replaced"):
        decay.step()


def test_a_replaced_parameter_of_a_pair_is_an_error():
    model = nn.ModuleDict({"q": nn.Linear(4, 4, bias=False), "k": nn.Linear(4, 4, bias=False)})
    pair = FactorPair("qk", model["q"].weight, model["k"].weight, lambda q, k: (q.view(2, 2, 4).mT, k.view(2, 2, 4)))
    decay = FrobeniusDecay(model, 0.1, pairs=[pair])
    decay.step()
    model["k"].weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(RuntimeError, match=r"^k.weight was replaced"):
        decay.step()


def test_groups_of_another_model_are_refused():
    decay = FrobeniusDecay(nn.Sequential(FactorizedLinear(4, 4, 2)), 0.1)
    with pytest.raises(ValueError, match="2 of the 2 Parameters that the decay covers are not in this Sequential"):
        param_groups(nn.Sequential(FactorizedLinear(4, 4, 2)), weight_decay=0.1, decay=decay)


def test_moving_and_converting_a_model_replaces_nothing():
    model = Wrapper()
    decay = FrobeniusDecay(model, 0.1)
    model.double().float().to(memory_format=torch.channels_last).load_state_dict(model.state_dict())
    decay.step()


@pytest.mark.parametrize("covered", [True, False])
def test_decoupled_decay_skips_the_step_that_a_scaler_skips(covered):
    """Whichever Parameter's gradient has overflowed: a GradScaler looks at all of them."""
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    decay = FrobeniusDecay(model, 0.3, decoupled=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    overflowed = model[0].u if covered else model[6].weight
    overflowed.grad[0, 0] = torch.inf
    decay.step(lr=0.1)
    assert all(torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))
    overflowed.grad[0, 0] = 1
    decay.step(lr=0.1)
    assert not torch.equal(model[0].u, before[0])


@pytest.mark.parametrize("kind", ["layers", "pairs"])
def test_the_penalty_can_be_differentiated_twice(kind):
    torch.manual_seed(0)
    u, vt = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((5, 2), (2, 3)))
    layer = FactorizedLinear(3, 5, 2, dtype=torch.float64)
    layer.u, layer.vt = u, vt
    pair = FactorPair("p", u, vt, lambda u, vt: (u[None], vt[None]))
    decay = FrobeniusDecay(layer, 0.7) if kind == "layers" else FrobeniusDecay(nn.ModuleList(), 0.7, pairs=[pair])
    dense = 0.35 * (u @ vt).square().sum()
    found, expected = (torch.autograd.grad(value, [u, vt], create_graph=True) for value in (decay.penalty(), dense))
    direction = [torch.randn_like(each) for each in found]
    twice = [
        torch.autograd.grad([(g * d).sum() for g, d in zip(grads, direction, strict=True)], [u, vt])
        for grads in (found, expected)
    ]
    for one, other in zip((*found, *twice[0]), (*expected, *twice[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_copies_of_model_and_decay_go_on_together():
    model = Wrapper()
    both = copy.deepcopy((model, FrobeniusDecay(model, 0.1)))
    both[1].step()
    assert both[0].layer().u.grad is not None
    assert model.layer().u.grad is None


def test_wrapping_and_moving_layers_replaces_nothing():
    model = nn.Sequential(FactorizedLinear(4, 4, 2), FactorizedLinear(4, 4, 2))
    decay = FrobeniusDecay(model, 0.1)
    model.insert(0, nn.Identity())
    decay.step()
    model[1] = nn.DataParallel(model[1])
    decay.step()
    model[2] = torch.compile(model[2], backend="eager")
    decay.step()
    values = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    assert torch.func.functional_call(Penalized(model, decay), {f"model.{name}": v for name, v in values.items()}, ()) == 0


class Penalized(nn.Module):
    def __init__(self, model, decay):
        super().__init__()
        self.model, self.decay = model, decay

    def forward(self):
        return self.decay.penalty()


def test_decoupled_decay_takes_empty_gradients():
    model = nn.Sequential(FactorizedLinear(4, 4, 2), nn.Linear(4, 0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    FrobeniusDecay(model, 0.1, decoupled=True).step(lr=0.1)


def test_autocast_changes_neither_the_penalty_nor_a_folded_weight():
    model = nn.Sequential(FactorizedLinear(64, 64, 8), FactorizedEmbedding(20, 16, 4))
    decay, expected = FrobeniusDecay(model, 1e-2), [layer.to_dense().detach() for layer in model]
    penalty = decay.penalty()
    grads = torch.autograd.grad(penalty, decay.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        under = decay.penalty()
        weight = model[0].weight.detach()
        densify_(model)
    assert torch.equal(penalty, under)
    assert all(map(torch.equal, grads, torch.autograd.grad(under, decay.parameters())))
    assert torch.equal(weight, expected[0])
    assert all(torch.equal(layer.weight, dense) for layer, dense in zip(model, expected, strict=True))


@pytest.mark.parametrize("order", [1, -1])
def test_layers_of_equal_shape_and_other_precision_decay_in_full_precision(order):
    full, half = FactorizedLinear(64, 64, 8), FactorizedLinear(64, 64, 8).half()
    for layer in (full, half):
        for factor in layer.factors():
            nn.init.constant_(factor, 100)
    FrobeniusDecay(nn.Sequential(*[full, half][::order]), 1e-7).step()
    exact = 1e-7 * 64 * 8 * 100.0**3  # the products overflow in half precision
    for factor in (*full.factors(), *half.factors()):
        torch.testing.assert_close(factor.grad.float(), torch.full_like(factor, exact).float(), rtol=1e-3, atol=0)


def test_decoupled_decay_beside_sparse_and_complex_gradients():
    model = nn.ModuleDict({"words": nn.Embedding(9, 4, sparse=True), "layer": FactorizedLinear(4, 4, 2)})
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    decay = FrobeniusDecay(model, 0.1, decoupled=True)

    def changed():
        before = model["layer"].u.detach().clone()
        decay.step(lr=0.1)
        return not torch.equal(model["layer"].u, before)

    (model["layer"](model["words"](torch.tensor([1, 1, 5]))).sum() + model.phase.abs().sum()).backward()
    assert model["words"].weight.grad.is_sparse
    assert changed()
    model.phase.grad[0] = complex(0, float("inf"))
    assert not changed()
    model.phase.grad[0] = 0
    model["words"].weight.grad = torch.sparse_coo_tensor([[1]], [[0, 0, float("nan"), 0]], (9, 4))
    assert not changed()


def test_a_model_on_the_meta_device_has_a_penalty_and_is_folded():
    model = nn.Sequential(FactorizedLinear(4, 4, 2, device="meta"))
    assert FrobeniusDecay(model, 0.1).penalty().is_meta
    assert model[0].weight.sum().is_meta
    densify_(model)
    assert model[0].weight.is_meta


def test_a_pair_of_parameters_that_are_stored_in_another_order():
    model = nn.Module()
    model.u, model.vt = (nn.Parameter(torch.randn(4, 6).T.contiguous().T) for _ in range(2))
    pair = FactorPair("pair", model.u, model.vt, lambda u, vt: (u.T.view(2, 3, 4).mT, vt.T.view(2, 3, 4)))
    decay = FrobeniusDecay(model, 0.1, pairs=[pair])
    groups = param_groups(model, weight_decay=0.1, decay=decay)
    decay.step()
    assert [group["name"] for group in groups] == ["factors"]
