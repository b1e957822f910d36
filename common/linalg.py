"""Linear algebra of factorized matrices: pure functions on tensors that know nothing of layers.

A matrix W of shape (m, n) is a chain of factors, W = U V^T or W = U M V^T. Suffixes denote shapes: ``u_mr`` is (m, r),
``vt_rn`` is (r, n). Every function that takes ``factors`` also accepts leading batch dimensions, equal in all factors.
"Paper" is Khodak et al., ICLR 2021.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off, on devices that have it."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64. It moves to the CPU if its device does not support float64 (Apple's GPU)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def at_least_float32(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, with half precision converted to float32."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def unroll(kernel: Tensor) -> Tensor:
    """The matrix of a convolution kernel: (out, in, kh, kw) -> (out * kh, in * kw).

    Rows run over (output channel, kernel row) and columns over (input channel, kernel column), so that W = U V^T is a
    (1, kw) convolution followed by a (kh, 1) convolution (paper, section 2).
    """
    out_channels, in_channels, kh, kw = kernel.shape
    return kernel.permute(0, 2, 1, 3).reshape(out_channels * kh, in_channels * kw)


def roll(matrix: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Inverse of :func:`unroll`: (..., out * kh, in * kw) -> (..., out, in, kh, kw)."""
    kh, kw = kernel_size
    *batch, rows, columns = matrix.shape
    return matrix.reshape(*batch, rows // kh, kh, columns // kw, kw).transpose(-3, -2)


def as_matrix(weight: Tensor) -> Tensor:
    """The matrix of an ordinary layer's weight: a convolution kernel is unrolled, and other weights are unchanged.

    A one-dimensional kernel, (out, in, k), is treated as a kernel of height 1.
    """
    if weight.ndim == 3:
        return weight.flatten(1)
    return unroll(weight) if weight.ndim == 4 else weight


def fan_out_init(matrix_mn: Tensor, rank: int, *, kernel: int) -> tuple[Tensor, Tensor]:
    """Regular initialization of the factors of a convolution with a square kernel. Only the shape of the matrix is used.

    Both factors are drawn from N(0, 2 / (out_channels * kernel^2)), the distribution from which He's initialization (fan out)
    draws the convolution itself. Returns ``u_mr`` and ``vt_rn`` for a matrix with m = out_channels * kernel rows
    (:func:`unroll`).
    """
    rows, columns = matrix_mn.shape
    std = math.sqrt(2 / (kernel * rows))
    return torch.randn(rows, rank) * std, torch.randn(rank, columns) * std


def spectral_init(matrix_mn: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Spectral initialization: factors U_r sqrt(S_r) and sqrt(S_r) V_r^T of the truncated SVD (paper, section 3.1).

    Returns ``u_mr`` and ``vt_rn``. Their product is the best rank-r approximation of the matrix (Eckart-Young). Columns of U
    and rows of V^T beyond the rank of the matrix have no singular value. They are zero in U and random in V^T. This leaves
    the product unchanged but, unlike zeros in both, lets gradient descent use them. Half-precision input is decomposed in
    float32.

    Raises ValueError if the rank is below 1 or the matrix is not finite.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not torch.isfinite(matrix_mn).all():
        raise ValueError(f"cannot decompose a {tuple(matrix_mn.shape)} matrix that contains NaN or infinite values")
    wide = matrix_mn.detach().to(torch.promote_types(matrix_mn.dtype, torch.float32))
    u, s, vt = _leading_svd(wide, rank) or _svd(wide)
    tolerance = s[:1] * max(wide.shape) * torch.finfo(s.dtype).eps
    live = int((s[:rank] > tolerance).sum())
    root = s[:live].sqrt()
    u, vt = u[:, :live] * root, root[:, None] * vt[:live]
    surplus = rank - live
    if surplus > 0:
        std = ((s.mean() if live else s.new_ones(())) / wide.shape[1]).sqrt()
        u = torch.cat([u, u.new_zeros(u.shape[0], surplus)], dim=1)
        vt = torch.cat([vt, torch.randn(surplus, vt.shape[1], dtype=vt.dtype, device=vt.device) * std])
    return u.to(matrix_mn.dtype).contiguous(), vt.to(matrix_mn.dtype).contiguous()


def _svd(matrix_mn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced SVD. If it does not converge, it is computed in float64 on the CPU, with a warning."""
    try:
        return torch.linalg.svd(matrix_mn, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        warnings.warn(f"the SVD of a {tuple(matrix_mn.shape)} matrix failed and is redone in float64: {error}", stacklevel=3)
        u, s, vt = torch.linalg.svd(matrix_mn.cpu().double(), full_matrices=False)
        return u.to(matrix_mn), s.to(matrix_mn), vt.to(matrix_mn)


def _leading_svd(matrix_mn: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The leading ``rank`` singular triples of a large float32 matrix on the CPU, or None if the full SVD is needed.

    They are computed from the leading eigenvectors of the Gram matrix of the shorter side, in about a third of the time of the
    SVD. In float64, the squared singular values keep more digits than float32 has. The result is None if a wanted singular
    value is below a thousandth of the largest, because its square would keep too few digits.
    """
    shorter = min(matrix_mn.shape)
    if matrix_mn.dtype != torch.float32 or matrix_mn.device.type != "cpu" or shorter < 256 or 2 * rank > shorter:
        return None
    from scipy.linalg import LinAlgError, eigh

    flat = (matrix_mn if matrix_mn.shape[0] >= matrix_mn.shape[1] else matrix_mn.mT).double()
    gram = (flat.mT @ flat).numpy()
    wanted = (shorter - rank, shorter - 1)
    try:
        values, vectors = eigh(gram, subset_by_index=wanted, driver="evr", overwrite_a=True, check_finite=False)
    except LinAlgError:
        return None
    s = torch.from_numpy(values).flip(0).clamp_min(0).sqrt()
    if s[-1] <= 1e-3 * s[0]:
        return None
    right = torch.from_numpy(vectors).flip(1)
    left = flat @ right / s
    u, v = (left, right) if flat.shape == matrix_mn.shape else (right, left)
    return u.float(), s.float(), v.mT.float()


def balance(u_mr: Tensor, vt_rn: Tensor) -> tuple[Tensor, Tensor]:
    """Spectral initialization of a product given by its factors: balanced factors with the same product.

    If the product has rank r, this equals ``spectral_init(u_mr @ vt_rn, r)`` up to the signs of singular vectors, without
    forming the product. Otherwise, the columns of U and rows of V^T without a singular value are zero. Accepts leading batch
    dimensions. Raises ValueError unless r <= min(m, n).
    """
    rank = u_mr.shape[-1]
    if rank > min(u_mr.shape[-2], vt_rn.shape[-1]):
        raise ValueError(f"rank {rank} exceeds the shorter side of the {u_mr.shape[-2]} x {vt_rn.shape[-1]} product")
    wide = torch.promote_types(u_mr.dtype, torch.float32)
    q_left, r_left = torch.linalg.qr(u_mr.detach().to(wide))
    q_right, r_right = torch.linalg.qr(vt_rn.detach().to(wide).mT)
    left, s, right = torch.linalg.svd(r_left @ r_right.mT)
    root = s.sqrt()
    u, vt = q_left @ left * root[..., None, :], root[..., :, None] * (right @ q_right.mT)
    return u.to(u_mr.dtype), vt.to(vt_rn.dtype)


def compose(factors: Sequence[Tensor]) -> Tensor:
    """The product of the factors, (..., m, n)."""
    product = factors[0]
    for factor in factors[1:]:
        product = product @ factor
    return product


def _dense_is_cheaper(factors: Sequence[Tensor]) -> bool:
    """Whether forming the (m, n) product of two factors costs less than their two (r, r) Gram matrices.

    In multiply-adds, this compares 3 m n r with 2 r^2 (m + n). The dense product is cheaper only for overcomplete ranks.
    """
    m, r = factors[0].shape[-2:]
    n = factors[-1].shape[-1]
    return len(factors) == 2 and 3 * m * n < 2 * r * (m + n)


def frobenius_grads(factors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of 1/2 ||F_1 F_2 ... F_k||_F^2 with respect to each factor (paper, section 3.2).

    The gradient is P_i^T P_i F_i S_i S_i^T, where P_i is the product of the factors before F_i and S_i that of the factors
    after it. For W = U V^T, the gradients are (U V^T V, V U^T U). The Gram matrices are at most (r, r), so W itself is formed
    only if that is cheaper.
    """
    return [compose(product) for product in frobenius_grad_products(factors)]


def frobenius_grad_products(factors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The gradients of :func:`frobenius_grads` for two or more factors, each as two matrices to multiply."""
    if _dense_is_cheaper(factors):
        u, vt = factors
        product = u @ vt
        return [(product, vt.mT), (u.mT, product)]
    before: list[Tensor | None] = [None]
    for factor in factors[:-1]:
        before.append(factor.mT @ (factor if before[-1] is None else before[-1] @ factor))
    after: list[Tensor | None] = [None]
    for factor in reversed(factors[1:]):
        after.append((factor if after[-1] is None else factor @ after[-1]) @ factor.mT)
    products: list[tuple[Tensor, ...]] = []
    for factor, left, right in zip(factors, before, reversed(after), strict=True):
        if right is None:
            assert left is not None
            products.append((left, factor))
        else:
            products.append((factor if left is None else left @ factor, right))
    return products


def frobenius_norm(factors: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of the product of the factors, shape (...). Uses Gram matrices if they are cheaper."""
    if len(factors) == 1 or _dense_is_cheaper(factors):
        return torch.linalg.matrix_norm(compose(factors))
    gram = factors[0].mT @ factors[0]
    for factor in factors[1:-1]:
        gram = factor.mT @ gram @ factor
    last = factors[-1]
    return (gram * (last @ last.mT)).sum((-2, -1)).clamp_min(0).sqrt()


class _SquaredNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> Tensor:
        grads = frobenius_grads(factors)
        ctx.save_for_backward(*factors, *grads)
        return (factors[0] * grads[0]).sum()  # <U, W V> = <U V^T, W>

    @staticmethod
    def backward(ctx: Any, *grads_of_output: Tensor) -> tuple[Tensor, ...]:
        (grad,) = grads_of_output
        half = len(ctx.saved_tensors) // 2
        factors, grads = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        if torch.is_grad_enabled():  # the gradients are differentiated, too
            grads = frobenius_grads(factors)
        return tuple(2 * grad * each for each in grads)


def squared_norm(factors: Sequence[Tensor]) -> Tensor:
    """||F_1 F_2 ... F_k||_F^2, summed over batch dimensions. It is differentiable twice.

    The forward pass also computes the gradients (:func:`frobenius_grads`). In all, this takes two thirds of the
    operations of autograd.
    """
    return _SquaredNorm.apply(*factors)


def nuclear_norm(factors: Sequence[Tensor]) -> Tensor:
    """Nuclear norm of the product, in float64: the sum of the singular values of R_U M R_V^T after QR of the outer factors."""
    chain = [to_float64(factor) for factor in factors]
    if len(chain) > 1:
        chain[0] = torch.linalg.qr(chain[0])[1]
        chain[-1] = torch.linalg.qr(chain[-1].mT)[1].mT
    return torch.linalg.svdvals(compose(chain)).sum(-1)


def nuclear_norm_bound(factors: Sequence[Tensor]) -> Tensor:
    """Upper bound on the nuclear norm, in float64. It is what weight decay on the factors penalizes (paper, equation 2).

    For two factors it is (||U||_F^2 + ||V||_F^2) / 2. For more, it is also multiplied by the spectral norms of those between.
    """
    u, *middle, vt = (to_float64(factor) for factor in factors)
    bound = (u.square().sum((-2, -1)) + vt.square().sum((-2, -1))) / 2
    for factor in middle:
        bound = bound * torch.linalg.matrix_norm(factor, ord=2)
    return bound


def non_orthogonality(factor_mr: Tensor) -> Tensor:
    """How far the columns of F are from orthogonal: ||F^T F - diag(F^T F)||_F / ||F^T F||_F, between 0 and 1.

    Leading batch dimensions are treated as the blocks of one block-diagonal matrix.
    """
    gram = factor_mr.mT @ factor_mr
    off_diagonal = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    norms = [torch.linalg.matrix_norm(matrix) for matrix in (off_diagonal, gram)]
    off, whole = (torch.linalg.vector_norm(norm) if norm.ndim else norm for norm in norms)
    return off / whole


def rescale(factors: Sequence[Tensor], norm: Tensor | float) -> list[Tensor]:
    """Scale all factors by one number, so that their product has the given Frobenius norm. A zero product is unchanged.

    Norms are compared in float64, where the squares of tiny float32 factors do not underflow.
    """
    current = frobenius_norm([to_float64(factor) for factor in factors])
    target = torch.as_tensor(norm, dtype=current.dtype, device=current.device)
    scale = torch.where(current > 0, target / current, torch.ones_like(current)) ** (1 / len(factors))
    return [(to_float64(factor) * scale[..., None, None]).to(factor) for factor in factors]  # the scale may be huge
