"""What pruning a channel or an eigendirection is expected to add to the loss, and the weights that compensate for it.

All after Wang et al., EigenDamage (ICML 2019). ``weight`` is a layer's matrix (out, n), float64, with n = in * k * k in the
order of ``conv.weight.flatten(1)``; its Fisher is G (x) A with G of shape (out, out) and A of shape (n, n). Scores have shape
(out,) and are in units of the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-3  # added to a factor's diagonal before inversion, as a share of its mean eigenvalue


def _inverse(factor: Tensor) -> Tensor:
    size = factor.shape[0]
    damping = DAMPING * factor.trace() / size + torch.finfo(factor.dtype).tiny ** 0.5  # positive even for a factor of zeros
    return torch.linalg.inv(factor + damping * torch.eye(size, dtype=factor.dtype, device=factor.device))


def c_obd(weight: Tensor, diagonal: Tensor) -> Tensor:
    """Channel OBD: sum over a channel's weights of w^2 F_ww / 2, with the diagonal (out, n) of the Fisher."""
    return (weight.square() * diagonal).sum(1) / 2


def c_obs(weight: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """Channel OBS: sum over a channel's weights of w^2 / [F^-1]_ww / 2."""
    return (weight.square() / torch.outer(_inverse(g).diagonal(), _inverse(a).diagonal())).sum(1) / 2


def c_obs_update(weight: Tensor, a: Tensor, g: Tensor, removed: Tensor) -> Tensor:
    """The weight after the sum of the changes that OBS makes for removing each weight of the removed channels."""
    a_inverse, g_inverse = _inverse(a), _inverse(g)
    share = weight[removed] / torch.outer(g_inverse.diagonal()[removed], a_inverse.diagonal())
    return weight - g_inverse[:, removed] @ share @ a_inverse


def kron_obd(weight: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """Kron-OBD: G_ii w_i^T A w_i / 2 for channel i with weights w_i, correlations within a channel included."""
    return g.diagonal() * ((weight @ a) * weight).sum(1) / 2


def kron_obs(weight: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """Kron-OBS: w_i^T A w_i / [G^-1]_ii / 2."""
    return ((weight @ a) * weight).sum(1) / _inverse(g).diagonal() / 2


def kron_obs_update(weight: Tensor, a: Tensor, g: Tensor, removed: Tensor) -> Tensor:
    """The weight with the removed channels at zero, after the best change of the other channels for their joint removal.

    This change does not depend on A.
    """
    g_inverse = _inverse(g)
    among = g_inverse[removed][:, removed]
    return weight - g_inverse[:, removed] @ torch.linalg.solve(among, weight[removed])


def channel_factor(a: Tensor, in_channels: int) -> Tensor:
    """The factor A of a convolution reduced to its input channels: the mean of its diagonal blocks, one a kernel position."""
    positions = a.shape[0] // in_channels
    blocks = a.view(in_channels, positions, in_channels, positions)
    return blocks.diagonal(dim1=1, dim2=3).mean(-1)


def eigendamage(kernel: Tensor, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A kernel (out, in, k, k) in the eigenbasis of its Fisher, G (x) A with A over input channels, and its scores.

    Returns the rotated kernel Q_G^T W Q_A in the kernel's shape, Q_A (in, in), Q_G (out, out), and the scores of the input
    directions (in,) and of the output directions (out,): sums of w^2 lambda_G lambda_A / 2 over the rotated kernel.
    """
    (values_a, q_a), (values_g, q_g) = torch.linalg.eigh(a), torch.linalg.eigh(g)
    rotated = torch.einsum("oikl,op,iq->pqkl", kernel, q_g, q_a)
    damage = rotated.square().sum((2, 3)) * torch.outer(values_g.clamp_min(0), values_a.clamp_min(0)) / 2
    return rotated, q_a, q_g, damage.sum(0), damage.sum(1)
