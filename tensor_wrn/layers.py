"""Convolutions whose channels are mixed by a tensor train or a Tucker tensor: depthwise k x k, then a factorized 1x1.

The 1x1 weight (out, in) is read, row by row, as a 3-way tensor of the shape that :func:`tensor_wrn.shapes.split` gives. This
tensor is factorized, initialized and decayed. Decompositions are tensorly's, truncated one mode at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tensorly
import torch
import torch.nn.functional as F
from tensorly.decomposition import partial_tucker, tensor_train
from torch import Tensor, nn

from common.layers import Factorized
from common.linalg import at_least_float32, outside_autocast, to_float64
from tensor_wrn.shapes import split

INITIALIZATIONS = ("regular", "spectral", "norm-matched", "released")


def scaled(rank_scale: float, size: int) -> int:
    """The rank that a scale in (0, 1] gives along a side of ``size``."""
    return max(1, round(rank_scale * size))


def decompose_train(tensor: Tensor, ranks: tuple[int, int]) -> list[Tensor]:
    """Cores (d0, r1), (r1, d1, r2) and (r2, d2) of the tensor train of a 3-way tensor, truncated from its last mode on.

    Ranks are limited to what the sizes allow.
    """
    with tensorly.backend_context("pytorch"):
        last, middle, first = tensor_train(tensor.permute(2, 1, 0), [1, ranks[1], ranks[0], 1]).factors
    return [first[..., 0].mT, middle.permute(2, 1, 0), last[0].mT]


def decompose_tucker(tensor: Tensor, ranks: tuple[int, int, int]) -> tuple[Tensor, list[Tensor]]:
    """Core (r0, r1, r2) and orthonormal factors (d_k, r_k): the higher-order SVD, truncated from the last mode on."""
    factors: dict[int, Tensor] = {}
    core = tensor
    with tensorly.backend_context("pytorch"):
        for mode in (2, 1, 0):
            (core, (factors[mode],)), _ = partial_tucker(core, [ranks[mode]], modes=[mode], init="svd", n_iter_max=1)
    return core, [factors[mode] for mode in range(3)]


class TensorPointwise(Factorized):
    """A 1x1 convolution whose weight is a 3-way tensor in factorized form; the base of the forms below.

    Ranks are ``rank_scale`` times the sides of the tensor, rounded, and at least 1. ``rule`` chooses the shape of the tensor.
    Parameters are allocated without values; :meth:`initialize_` sets them.

    Shapes: input (N, in_channels, H, W), output (N, out_channels, H, W).
    """

    contraction = "composed"

    def __init__(self, in_channels: int, out_channels: int, rank_scale: float, rule: str = "released") -> None:
        super().__init__()
        if not 0 < rank_scale <= 1:
            raise ValueError(f"rank_scale of a tensor must be above 0 and at most 1, got {rank_scale}")
        self.in_channels, self.out_channels, self.rank_scale = in_channels, out_channels, rank_scale
        self.rule, self.shape = rule, split(in_channels * out_channels, rule)
        self.cores = nn.ParameterList(nn.Parameter(torch.empty(size)) for size in self._sizes())

    def _sizes(self) -> list[tuple[int, ...]]:
        """Shapes of the cores."""
        raise NotImplementedError

    def ranks(self) -> tuple[int, ...]:
        """The ranks of the form."""
        raise NotImplementedError

    def _decompose(self, tensor: Tensor) -> list[Tensor]:
        """Cores that approximate a tensor, found by truncating one mode at a time."""
        raise NotImplementedError

    def _paths(self) -> int:
        """Number of products of core entries that sum to one entry of the tensor."""
        raise NotImplementedError

    def tensor(self, cores: Sequence[Tensor]) -> Tensor:
        """The 3-way tensor of the cores. Leading batch dimensions, which must be equal in all cores, are kept."""
        raise NotImplementedError

    def squared_norm(self) -> Tensor:
        """Squared Frobenius norm of the tensor from Gram matrices of the cores, in float32 or better. Forms no tensor."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize_(self, init: str) -> None:
        """Set the values of the cores.

        "spectral":      the decomposition of an ordinary initialization of the weight, N(0, 2 / out).
        "regular":       independent normal cores of equal variance, such that the tensor's entries have variance 2 / out.
        "norm-matched":  the same, scaled to the norm that spectral initialization gives for a newly drawn weight.
        "released":      what the released code calls regular: the decomposition of torch's default, U(+-1 / sqrt(in)).

        Raises ValueError for another name.
        """
        if init not in INITIALIZATIONS:
            raise ValueError(f"init must be one of {', '.join(INITIALIZATIONS)}, got {init!r}")
        draw = torch.empty(self.shape, device=self.cores[0].device)
        if init == "released":
            bound = 1 / math.sqrt(self.in_channels)
            self._set(self._decompose(to_float64(draw.uniform_(-bound, bound))))
            return
        draw.normal_(std=math.sqrt(2 / self.out_channels))
        if init == "spectral":
            self._set(self._decompose(to_float64(draw)))
            return
        std = (2 / self.out_channels / self._paths()) ** (0.5 / len(self.cores))
        for core in self.cores:
            core.normal_(std=std)
        if init == "norm-matched":
            cores = [core.clone() for core in self.cores]
            self._set(self._decompose(to_float64(draw)))
            target = self.squared_norm()
            self._set(cores)
            scale = (target / self.squared_norm()) ** (0.5 / len(self.cores))
            for core in self.cores:
                core.mul_(scale)

    def _set(self, cores: list[Tensor]) -> None:
        for parameter, core in zip(self.cores, cores, strict=True):
            parameter.copy_(core)

    def factors(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.cores)

    def compose(self, factors: Sequence[Tensor]) -> Tensor:
        return self.tensor(factors).flatten(-3).unflatten(-1, (self.out_channels, self.in_channels, 1, 1))

    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_channels, self.in_channels, 1, 1))

    def to_dense(self) -> Tensor:
        return self.compose(self.factors())

    def to_layer(self) -> nn.Conv2d:
        core = self.cores[0]
        layer = nn.utils.skip_init(
            nn.Conv2d, self.in_channels, self.out_channels, 1, bias=False, device=core.device, dtype=core.dtype
        )
        with torch.no_grad(), outside_autocast(core.device):
            layer.weight.copy_(self.to_dense())
        layer.weight.requires_grad_(any(each.requires_grad for each in self.cores))
        return layer.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        with outside_autocast(input.device):  # rounded once, as an ordinary weight is
            weight = self.weight_in_use()
        return F.conv2d(input, weight)

    def extra_repr(self) -> str:
        sizes = ", ".join("x".join(map(str, core.shape)) for core in self.cores)
        return f"{self.in_channels}, {self.out_channels}, shape={self.shape}, cores=({sizes})"


class TensorTrainPointwise(TensorPointwise):
    """W = G1 G2 G3 with cores (d0, r1), (r1, d1, r2), (r2, d2). Each rank scales with the smaller adjacent side."""

    def _sizes(self) -> list[tuple[int, ...]]:
        (d0, d1, d2), (r1, r2) = self.shape, self.ranks()
        return [(d0, r1), (r1, d1, r2), (r2, d2)]

    def ranks(self) -> tuple[int, int]:
        d0, d1, d2 = self.shape
        return scaled(self.rank_scale, min(d0, d1)), scaled(self.rank_scale, min(d1, d2))

    def _decompose(self, tensor: Tensor) -> list[Tensor]:
        return decompose_train(tensor, self.ranks())

    def _paths(self) -> int:
        return math.prod(self.ranks())

    def tensor(self, cores: Sequence[Tensor]) -> Tensor:
        return _train(*cores)

    def squared_norm(self) -> Tensor:
        first, middle, last = at_least_float32(self.cores)
        left = torch.tensordot(first.mT @ first, middle, 1)  # (r1, d1, r2)
        return (left * torch.tensordot(middle, last @ last.mT, 1)).sum()


class TuckerPointwise(TensorPointwise):
    """W = core x0 U0 x1 U1 x2 U2 with core (r0, r1, r2) and factors (d_k, r_k), ranks scaled from the d_k."""

    def _sizes(self) -> list[tuple[int, ...]]:
        ranks = self.ranks()
        return [ranks, *zip(self.shape, ranks, strict=True)]

    def ranks(self) -> tuple[int, int, int]:
        r0, r1, r2 = (scaled(self.rank_scale, size) for size in self.shape)
        return r0, r1, r2

    def _decompose(self, tensor: Tensor) -> list[Tensor]:
        core, factors = decompose_tucker(tensor, self.ranks())
        return [core, *factors]

    def _paths(self) -> int:
        return math.prod(self.ranks())

    def tensor(self, cores: Sequence[Tensor]) -> Tensor:
        core, *factors = cores
        return _multiply(core, *factors)

    def squared_norm(self) -> Tensor:
        core, *factors = at_least_float32(self.cores)
        return (core * _multiply(core, *(factor.mT @ factor for factor in factors))).sum()


class TuckerTrainPointwise(TuckerPointwise):
    """A Tucker tensor whose core is kept as a train (r0, b), (b, r1, r2), (r2, r2) with b = min(d0, r1 r2), as tntorch does.

    This is the "Tucker" of the released code: the same tensors as :class:`TuckerPointwise` at the same ranks, with more
    parameters than they need (b is above r0). It is here so that the released rows and their counts can be repeated.
    """

    def _bond(self) -> int:
        _, r1, r2 = self.ranks()
        return min(self.shape[0], r1 * r2)

    def _sizes(self) -> list[tuple[int, ...]]:
        (r0, r1, r2), bond = self.ranks(), self._bond()
        return [(r0, bond), (bond, r1, r2), (r2, r2), *zip(self.shape, self.ranks(), strict=True)]

    def _decompose(self, tensor: Tensor) -> list[Tensor]:
        _, (u0, u1, u2) = decompose_tucker(tensor, self.ranks())
        identity = [torch.eye(size, dtype=tensor.dtype, device=tensor.device) for size in (tensor.shape[0], u2.shape[1])]
        middle = _multiply(tensor, identity[0], u1.mT, u2.mT)  # (d0, r1, r2)
        first = u0.mT
        if self._bond() < self.shape[0]:
            basis, rest = torch.linalg.qr(middle.flatten(1))
            first, middle = first @ basis, rest.view(-1, *middle.shape[1:])
        return [first, middle, identity[1], u0, u1, u2]

    def _paths(self) -> int:
        return self._bond() * self.ranks()[2] * super()._paths()

    def tensor(self, cores: Sequence[Tensor]) -> Tensor:
        first, middle, last, *factors = cores
        return _multiply(_train(first, middle, last), *factors)

    def squared_norm(self) -> Tensor:
        first, middle, last, *factors = at_least_float32(self.cores)
        core = _train(first, middle, last)
        return (core * _multiply(core, *(factor.mT @ factor for factor in factors))).sum()


def _train(first: Tensor, middle: Tensor, last: Tensor) -> Tensor:
    """The tensor (..., a, b, c) of a train with cores (..., a, r), (..., r, b, s) and (..., s, c)."""
    joined = (first @ middle.flatten(-2)).unflatten(-1, middle.shape[-2:])  # (..., a, b, s)
    return (joined.flatten(-3, -2) @ last).unflatten(-2, joined.shape[-3:-1])


def _multiply(core: Tensor, u0: Tensor, u1: Tensor, u2: Tensor) -> Tensor:
    """The core (..., a, b, c) multiplied along its modes by the matrices (..., d, a), (..., e, b) and (..., f, c)."""
    for matrix in (u0, u1, u2):  # each product moves its mode to the end, so that three restore the order
        rest = core.movedim(-3, -1)  # (..., b, c, a)
        core = (rest.flatten(-3, -2) @ matrix.mT).unflatten(-2, rest.shape[-3:-1])
    return core


class SeparableConv2d(nn.Module):
    """A convolution as a depthwise k x k layer and a factorized pointwise layer, without bias.

    Shapes: as ``nn.Conv2d``. Raises ValueError for groups other than 1.
    """

    pointwise_class: type[TensorPointwise]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        rank_scale: float,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        rule: str = "released",
    ) -> None:
        super().__init__()
        if groups != 1:
            raise ValueError(f"{type(self).__name__} mixes all channels: groups must be 1, got {groups}")
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride=stride, padding=padding, groups=in_channels, bias=False
        )
        self.pointwise = self.pointwise_class(in_channels, out_channels, rank_scale, rule)

    def forward(self, input: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(input))


class TensorTrainConv2d(SeparableConv2d):
    pointwise_class = TensorTrainPointwise


class TuckerConv2d(SeparableConv2d):
    pointwise_class = TuckerPointwise


class TuckerTTConv2d(SeparableConv2d):
    pointwise_class = TuckerTrainPointwise


FORMS: dict[str, Callable[..., SeparableConv2d]] = {
    "TensorTrain": TensorTrainConv2d,
    "Tucker": TuckerConv2d,
    "TuckerTT": TuckerTTConv2d,
}
