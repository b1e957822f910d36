"""The linear algebra against dense oracles in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import linalg

SHAPES = [(7, 5, 3), (5, 7, 3), (4, 4, 4), (6, 3, 1), (3, 4, 9)]  # (m, n, rank), the last overcomplete


def random_factors(m, n, r, depth=2, batch=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(m, r), *[(r, r)] * (depth - 2), (r, n)]
    return [torch.randn(*batch, *shape, dtype=torch.float64, generator=generator) for shape in shapes]


def test_unrolled_convolution_is_the_sum_over_rows_of_the_definition():
    kernel = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    matrix = linalg.unroll(kernel)
    assert matrix.shape == (8, 15)
    for out, row, channel, column in [(0, 0, 0, 0), (3, 1, 2, 4), (2, 0, 1, 3)]:
        assert matrix[out * 2 + row, channel * 5 + column] == kernel[out, channel, row, column]
    assert torch.equal(linalg.roll(matrix, (2, 5)), kernel)


@pytest.mark.parametrize("kernel", [1, 3])
def test_fan_out_factors_have_the_deviation_of_the_convolution(kernel):
    """N(0, 2 / (out * kernel^2)), which torch's own initialization of a convolution draws from too."""
    torch.manual_seed(0)
    donor = torch.nn.init.kaiming_normal_(torch.empty(256, 128, kernel, kernel), mode="fan_out")
    factors = linalg.fan_out_init(linalg.unroll(donor), 64, kernel=kernel)
    assert [factor.shape for factor in factors] == [(256 * kernel, 64), (64, 128 * kernel)]
    for factor in factors:
        assert factor.std() == pytest.approx(donor.std().item(), rel=0.05)
        assert factor.mean().abs() < 0.05 * donor.std()


@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_spectral_init_is_the_best_approximation(m, n, rank):
    """Eckart-Young: the error is the norm of the discarded singular values, and the factors are balanced."""
    matrix = torch.randn(m, n, dtype=torch.float64)
    u, vt = linalg.spectral_init(matrix, rank)
    singular_values = torch.linalg.svdvals(matrix)
    error = torch.linalg.matrix_norm(matrix - u @ vt)
    assert error == pytest.approx(singular_values[rank:].square().sum().sqrt().item(), abs=1e-12)
    k = min(rank, m, n)
    torch.testing.assert_close((u.T @ u)[:k, :k], torch.diag(singular_values[:k]))
    torch.testing.assert_close((vt @ vt.T)[:k, :k], torch.diag(singular_values[:k]))


@pytest.mark.parametrize(("m", "n", "rank"), [(300, 410, 20), (410, 300, 20), (512, 256, 128), (256, 300, 1)])
def test_large_matrices_need_no_whole_svd_and_are_as_exact(m, n, rank, monkeypatch):
    """Eckart-Young to 1e-6 against float64, from some eigenvectors of the Gram matrix."""
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    u64, s64, vt64 = torch.linalg.svd(matrix.double(), full_matrices=False)
    monkeypatch.setattr(torch.linalg, "svd", None)
    u, vt = linalg.spectral_init(matrix, rank)
    assert u.dtype == vt.dtype == torch.float32
    best = (u64[:, :rank] * s64[:rank]) @ vt64[:rank]
    assert torch.linalg.matrix_norm(u.double() @ vt.double() - best) < 1e-6 * torch.linalg.matrix_norm(best)
    error = torch.linalg.matrix_norm(matrix.double() - u.double() @ vt.double())
    assert error == pytest.approx(s64[rank:].square().sum().sqrt().item(), rel=1e-6)
    torch.testing.assert_close(u.T @ u, vt @ vt.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("smallest", [1e-6, 0.0])
def test_matrices_of_falling_singular_values_take_the_whole_svd(smallest):
    """Their squares would keep too few digits."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    values = torch.logspace(0, -6, 300, dtype=torch.float64).clamp_min(smallest)
    values[200:] = smallest
    matrix = (left * values @ right).float()
    u, vt = linalg.spectral_init(matrix, 100)
    best = (left[:, :100] * values[:100]) @ right[:100]
    assert torch.linalg.matrix_norm(u.double() @ vt.double() - best) < 1e-6
    assert torch.linalg.matrix_norm(u.double() @ vt.double() - matrix.double()) < values[100:].norm() + 1e-6


def test_surplus_columns_are_not_dead():
    """Every column beyond min(m, n) is zero in exactly one factor, so that it changes nothing and still gets a gradient."""
    u, vt = linalg.spectral_init(torch.randn(4, 6, dtype=torch.float64), 9)
    assert (u[:, 4:] == 0).all()
    assert (vt[4:] != 0).all()
    u.requires_grad_()
    ((u @ vt) * torch.randn(4, 6)).sum().backward()
    assert (u.grad[:, 4:] != 0).all()


MATRICES = [torch.zeros(5, 4), torch.ones(5, 4), torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0]))]


@pytest.mark.parametrize("matrix", [*MATRICES, torch.zeros(300, 260), torch.ones(300, 260)])
def test_columns_beyond_the_rank_of_the_matrix_are_not_dead(matrix):
    u, vt = linalg.spectral_init(matrix, 4)
    large = {"rtol": 2e-4, "atol": 1e-5} if max(matrix.shape) >= 256 else {}  # LAPACK's float32 errors grow with the sides
    torch.testing.assert_close(u @ vt, matrix, **large)
    rank = int(torch.linalg.matrix_rank(matrix))
    assert (u[:, rank:] == 0).all()
    assert (vt[rank:].norm(dim=1) > 0.01).all()


def test_spectral_init_refuses_what_it_cannot_decompose():
    with pytest.raises(ValueError, match="NaN"):
        linalg.spectral_init(torch.tensor([[1.0, float("nan")]]), 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        linalg.spectral_init(torch.ones(2, 2), 0)


def test_half_precision_is_decomposed_in_float32():
    u, vt = linalg.spectral_init(torch.randn(6, 4).bfloat16(), 4)
    assert u.dtype == vt.dtype == torch.bfloat16


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_frobenius_grads_equal_autograd(m, n, rank, depth, batch):
    factors = [f.requires_grad_() for f in random_factors(m, n, rank, depth, batch)]
    penalty = linalg.compose(factors).square().sum() / 2
    for closed, auto in zip(linalg.frobenius_grads(factors), torch.autograd.grad(penalty, factors), strict=True):
        torch.testing.assert_close(closed, auto, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", [2, 3])
def test_frobenius_norm_and_grads_gradcheck(depth):
    factors = [f.requires_grad_() for f in random_factors(5, 4, 3, depth)]
    assert torch.autograd.gradcheck(lambda *f: linalg.frobenius_norm(f), factors)
    assert torch.autograd.gradcheck(lambda *f: tuple(linalg.frobenius_grads(f)), factors)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_squared_norm_is_that_of_the_product_and_so_is_its_gradient(m, n, rank, depth, batch):
    factors = [f.requires_grad_() for f in random_factors(m, n, rank, depth, batch)]
    expected, found = linalg.compose(factors).square().sum(), linalg.squared_norm(factors)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip(*(torch.autograd.grad(3 * norm, factors) for norm in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(lambda *f: linalg.squared_norm(f), factors)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*[st.integers(1, 12)] * 3), st.sampled_from([2, 3, 4]), st.integers(0, 2**32), st.sampled_from([1e-6, 1.0, 1e6])
)
def test_norms_equal_those_of_the_dense_product(shape, depth, seed, scale):
    factors = [f * scale for f in random_factors(*shape, depth=depth, seed=seed)]
    dense = linalg.compose(factors)
    torch.testing.assert_close(linalg.frobenius_norm(factors), torch.linalg.matrix_norm(dense), rtol=1e-9, atol=0)
    nuclear = torch.linalg.matrix_norm(dense, ord="nuc")
    torch.testing.assert_close(linalg.nuclear_norm(factors), nuclear, rtol=1e-9, atol=0)
    assert linalg.nuclear_norm_bound(factors) >= nuclear * (1 - 1e-9)


def test_nuclear_norm_bound_is_tight_for_balanced_factors():
    factors = linalg.spectral_init(torch.randn(6, 5, dtype=torch.float64), 4)
    torch.testing.assert_close(linalg.nuclear_norm_bound(factors), linalg.nuclear_norm(factors))


def test_non_orthogonality():
    assert linalg.non_orthogonality(torch.eye(5, 3)) == 0
    assert linalg.non_orthogonality(torch.ones(5, 2)) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("depth", [2, 3])
def test_rescale_reaches_the_norm_and_scales_alike(depth):
    factors = random_factors(5, 4, 3, depth)
    scaled = linalg.rescale(factors, 2.5)
    assert linalg.frobenius_norm(scaled) == pytest.approx(2.5)
    ratios = [(s / f).flatten()[0] for s, f in zip(scaled, factors, strict=True)]
    torch.testing.assert_close(ratios[0], ratios[-1])


def test_rescale_survives_zero_and_tiny_factors():
    assert (linalg.rescale([torch.zeros(3, 2), torch.zeros(2, 3)], 1.0)[0] == 0).all()
    tiny = [torch.full((3, 2), 1e-25), torch.full((2, 3), 1e-25)]
    assert linalg.frobenius_norm(linalg.rescale(tiny, 1.0)) == pytest.approx(1.0, rel=1e-5)
