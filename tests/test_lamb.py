"""LAMB against timm and the paper's algorithm written out, with Frobenius decay against autograd of the penalty, in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn

from common import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear, FactorPair, FrobeniusDecay, Lamb, param_groups


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        FactorizedLinear(5, 7, 3),
        FactorizedLinear(5, 7, 3),
        FactorizedLinear(5, 7, 3, depth=3),
        FactorizedConv2d(3, 4, 3, 6),
        FactorizedEmbedding(9, 4, 2),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
    ).double()


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)


def plain_lamb(model, steps, lr, betas, eps, weight_decay, penalty=None, adapt=True):
    """Algorithm 2 of the paper, a Parameter at a time; ``penalty`` of the model is differentiated by autograd."""
    beta1, beta2 = betas
    parameters = list(model.parameters())
    moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in parameters]
    for t in range(1, steps + 1):
        give_gradients(model, t)
        decays = [None] * len(parameters)
        if penalty is not None:
            decays = torch.autograd.grad(penalty(model), parameters, allow_unused=True)
        with torch.no_grad():
            for x, (m, v), decay in zip(parameters, moments, decays, strict=True):
                m.copy_(beta1 * m + (1 - beta1) * x.grad)
                v.copy_(beta2 * v + (1 - beta2) * x.grad**2)
                r = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
                u = r + weight_decay * x + (0 if decay is None else decay)
                ratio = x.norm() / u.norm() if adapt and x.norm() > 0 and u.norm() > 0 else 1
                x.sub_(lr * ratio * u)


def take(optimizer, model, steps, first=1):
    for step in range(first, first + steps):
        give_gradients(model, step)
        optimizer.step()


def assert_equal_weights(one, other, tolerance=1e-12):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.8, 0.0)])
def test_it_is_the_algorithm_of_the_paper(betas, weight_decay):
    model, reference = make_model(), make_model()
    take(Lamb(model.parameters(), 0.03, betas, 1e-4, weight_decay), model, 30)
    plain_lamb(reference, 30, 0.03, betas, 1e-4, weight_decay)
    assert_equal_weights(model, reference)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_the_lamb_of_timm(weight_decay):
    timm = pytest.importorskip("timm.optim")
    model, reference = make_model(), make_model()
    take(Lamb(model.parameters(), 0.03, weight_decay=weight_decay), model, 30)
    options = {"max_grad_norm": None, "always_adapt": True, "eps": 1e-6, "weight_decay": weight_decay}
    take(timm.Lamb(reference.parameters(), 0.03, **options), reference, 30)
    assert_equal_weights(model, reference)


def penalty(model):
    """.7/2 sum ||W||_F^2, layer by layer, with none of the code under test."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in list(model)[:5]:
        middle = layer.m if layer.depth == 3 else torch.eye(layer.rank, dtype=torch.float64)
        total = total + 0.35 * (layer.u @ middle @ layer.vt).square().sum()
    return total


def test_frobenius_decay_joins_the_update_before_the_trust_ratio():
    model, reference = make_model(), make_model()
    decay = FrobeniusDecay(model, 0.7)
    take(Lamb(param_groups(model, weight_decay=0.0, decay=decay), 0.03, decay=decay), model, 30)
    plain_lamb(reference, 30, 0.03, (0.9, 0.999), 1e-6, 0.0, penalty)
    assert_equal_weights(model, reference)


def test_the_decay_of_packed_heads_is_that_of_autograd():
    torch.manual_seed(0)
    attention, reference = (nn.MultiheadAttention(8, 2, bias=False, dtype=torch.float64) for _ in range(2))
    reference.load_state_dict(attention.state_dict())
    packed = attention.in_proj_weight
    pair = FactorPair("qk", packed, packed, lambda u, vt: (u[:8].view(2, 4, 8).mT, vt[8:16].view(2, 4, 8)))

    def penalty(model):
        q, k = model.in_proj_weight[:8].view(2, 4, 8), model.in_proj_weight[8:16].view(2, 4, 8)
        return 0.25 * (q.mT @ k).square().sum()

    take(Lamb(attention.parameters(), 0.03, decay=FrobeniusDecay(attention, 0.5, pairs=[pair])), attention, 10)
    plain_lamb(reference, 10, 0.03, (0.9, 0.999), 1e-6, 0.0, penalty)
    assert_equal_weights(attention, reference)


def test_with_orthonormal_v_the_decay_of_u_is_weight_decay():
    frobenius, ordinary = (FactorizedLinear(8, 6, 3, bias=False, dtype=torch.float64) for _ in range(2))
    ordinary.load_state_dict(frobenius.state_dict())
    vt = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T
    for layer in (frobenius, ordinary):
        layer.vt.data = vt.clone()
        layer.vt.requires_grad_(False)
    for layer, options in ((frobenius, {"decay": FrobeniusDecay(frobenius, 0.2)}), (ordinary, {"weight_decay": 0.2})):
        optimizer = Lamb([layer.u], 0.03, **options)
        for step in range(20):
            give_gradients(layer, step)
            optimizer.step()
    torch.testing.assert_close(frobenius.u, ordinary.u, rtol=1e-14, atol=1e-14)
    assert torch.equal(frobenius.vt, vt)


def test_parameters_without_decay_have_a_trust_ratio():
    """Each step is as long as lr times the Parameter."""
    model = make_model()
    decay = FrobeniusDecay(model, 0.0)
    optimizer = Lamb(param_groups(model, weight_decay=0.1, decay=decay), 0.03, decay=decay)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    take(optimizer, model, 1)
    for old, new in zip(before, model.parameters(), strict=True):
        if old.any():
            torch.testing.assert_close((new - old).norm(), 0.03 * old.norm())


def test_without_adapting_it_is_adam_with_the_decay_of_adamw():
    model, reference = make_model(), make_model()
    groups = [{"params": list(model.parameters())[::2]}, {"params": list(model.parameters())[1::2], "adapt": False}]
    take(Lamb([groups[1], {**groups[0], "lr": 0.0}], 0.03, weight_decay=0.1), model, 10)
    adam = torch.optim.AdamW(list(reference.parameters())[1::2], 0.03, eps=1e-6, weight_decay=0.1)
    take(adam, reference, 10)
    assert_equal_weights(model, reference)


def test_zero_weights_and_zero_updates_have_a_trust_ratio_of_one():
    zero, still = (nn.Parameter(value * torch.ones(3, dtype=torch.float64)) for value in (0.0, 2.0))
    zero.grad, still.grad = torch.tensor([1.0, -2.0, 3.0]).double(), torch.zeros_like(still)
    Lamb([zero, still], 0.1).step()
    torch.testing.assert_close(zero.detach(), torch.tensor([-0.1, 0.1, -0.1]).double(), rtol=1e-5, atol=0)
    assert (still == 2).all()


def test_parameters_without_gradients_are_skipped_and_count_their_own_steps():
    model, reference = make_model(), make_model()
    decay = FrobeniusDecay(model, 0.7)
    optimizer = Lamb(model.parameters(), 0.03, decay=decay)
    for step in (1, 2, 3):
        give_gradients(model, step)
        if step < 3:
            model[0].u.grad = None
        before = model[0].u.detach().clone()
        optimizer.step()
        assert torch.equal(before, model[0].u) == (step < 3)
    assert optimizer.state[model[0].u]["steps"] == 1
    assert optimizer.state[model[0].vt]["steps"] == 3
    (vt,) = torch.autograd.grad(penalty(reference), [reference[0].vt])
    give_gradients(reference, 1)
    u = reference[0].vt.grad / (reference[0].vt.grad.abs() + 1e-6) + vt
    expected = reference[0].vt - 0.03 * reference[0].vt.norm() / u.norm() * u
    single = make_model()
    give_gradients(single, 1)
    single[0].u.grad = None
    Lamb(single.parameters(), 0.03, decay=FrobeniusDecay(single, 0.7)).step()
    torch.testing.assert_close(single[0].vt, expected)


@pytest.mark.parametrize("lr", [0.03, torch.tensor(0.03)])
def test_a_resumed_optimizer_goes_on_bit_for_bit(lr, tmp_path):
    def make():
        model = make_model()
        decay = FrobeniusDecay(model, 0.7)
        return model, Lamb(param_groups(model, weight_decay=0.1, decay=decay), lr, decay=decay)

    (whole, optimizer), (first, stopped), (second, resumed) = make(), make(), make()
    take(optimizer, whole, 9)
    take(stopped, first, 4)
    torch.save({"model": first.state_dict(), "optimizer": stopped.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    take(resumed, second, 5, first=5)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_float32_corrects_the_bias_of_the_first_step_to_all_digits():
    """In float32, 1 - .999 and 1 - .999^1 differ by 1e-5 of their value."""
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.tensor([1e-3, 1.0, 1e3, -1.0])
    Lamb([{"params": [weight], "adapt": False}], 0.5, eps=0.0).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.5, 0.5, 0.5, 1.5]), rtol=3e-7, atol=0)


def test_a_learning_rate_that_is_a_tensor_may_change_in_place():
    model, reference = make_model(), make_model()
    lr = torch.tensor(0.03, dtype=torch.float64)
    by_tensor, by_number = Lamb(model.parameters(), lr), Lamb(reference.parameters(), 0.03)
    take(by_tensor, model, 2)
    take(by_number, reference, 2)
    lr.fill_(0.001)
    by_number.param_groups[0]["lr"] = 0.001
    take(by_tensor, model, 2, first=3)
    take(by_number, reference, 2, first=3)
    assert_equal_weights(model, reference)


def test_the_loss_of_a_closure_is_returned_and_has_gradients():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lamb([weight], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 25
    assert optimizer.step(closure).item() < 25


def test_copies_of_model_decay_and_optimizer_go_on_together():
    model = make_model()
    optimizer = Lamb(model.parameters(), 0.03, decay=FrobeniusDecay(model, 0.7))
    take(optimizer, model, 2)
    for copied in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        other, its = copied((model, optimizer))
        take(its, other, 2, first=3)
        assert not torch.equal(other[0].u, model[0].u)
    take(optimizer, model, 2, first=3)
    assert_equal_weights(other, model, tolerance=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "learning rate must be finite and not negative, got -1.0"),
        ({"lr": float("nan")}, "learning rate must be finite"),
        ({"lr": torch.ones(2)}, r"must have no dimensions, got shape \(2,\)"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers from 0 to below 1, got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": -1e-6}, "eps must be finite and not negative"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite and not negative, got inf"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused_in_every_group(options, message):
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        Lamb([weight], **{"lr": 0.1} | options)
    with pytest.raises(ValueError, match=message):
        Lamb([{"params": [weight], **options}], 0.1)


def test_half_precision_is_refused():
    """In bfloat16 a count of steps stays at 256."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"needs Parameters in float32 or float64, got torch\.bfloat16"):
        Lamb([weight], 0.1)
    optimizer = Lamb([nn.Parameter(torch.ones(3))], 0.1)
    with pytest.raises(ValueError, match="needs Parameters in float32"):
        optimizer.add_param_group({"params": [weight]})
    assert len(optimizer.param_groups) == 1


def test_a_decay_that_overrides_step_alone_is_refused():
    class Own(FrobeniusDecay):
        def step(self, lr=None):
            raise AssertionError

    model = make_model()
    with pytest.raises(ValueError, match="Own overrides only step: override add_to, too"):
        Lamb(model.parameters(), 0.1, decay=Own(model, 0.1))
    Own.add_to = lambda self, updates: None
    Lamb(model.parameters(), 0.1, decay=Own(model, 0.1))


def test_decoupled_decay_is_refused():
    model = make_model()
    decay = FrobeniusDecay(model, 0.1, decoupled=True)
    with pytest.raises(ValueError, match="before the trust ratio, but this decay is decoupled"):
        Lamb(model.parameters(), 0.1, decay=decay)
    with pytest.raises(ValueError, match=r"cannot be added to updates"):
        decay.add_to({})


def test_a_step_after_a_covered_parameter_was_replaced_is_an_error():
    model = make_model()
    optimizer = Lamb(model.parameters(), 0.1, decay=FrobeniusDecay(model, 0.1))
    model[0].u = nn.Parameter(torch.ones_like(model[0].u))
    give_gradients(model, 1)
    with pytest.raises(RuntimeError, match=r"^0.u was replaced"):
        optimizer.step()
