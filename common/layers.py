"""Layers whose weight is a product of factors: replacements for torch's Linear, Conv1d, Conv2d and Embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair, _single

from . import linalg
from .weight import ComposedWeight

Contraction = Literal["auto", "thin", "composed"]


class Factorized(nn.Module):
    """Base class of layers that hold the factors of a weight instead of the weight.

    A subclass defines :meth:`factors`, :meth:`to_dense` and :meth:`to_layer`. Decay and norms need nothing else. A subclass
    may override the other methods with cheaper computations.

    ``.weight`` reads as the dense weight, because other code expects it. It cannot be assigned or changed in place. It is
    composed when it is first used in a computation (:class:`common.weight.ComposedWeight`).

    A subclass sets ``contraction = "composed"`` if its forward pass uses :meth:`weight_in_use` and it defines :meth:`compose`.
    :class:`common.composition.Composition` then composes the weights of many such layers at once.
    """

    contraction: str = "thin"  # how forward uses the factors: "thin" in sequence, "composed" as one weight
    contraction_is_automatic = False  # whether it was given as "auto", so that measurements may change it
    _composed: Tensor | None = None  # the weight that a Composition made, while it is active

    def factors(self) -> tuple[nn.Parameter, ...]:
        """The Parameters whose product is the weight, left to right."""
        raise NotImplementedError

    def to_dense(self) -> Tensor:
        """The weight, in the shape that the ordinary layer stores. It is differentiable."""
        raise NotImplementedError

    def to_layer(self) -> nn.Module:
        """An ordinary layer with the same function, device, dtype and mode."""
        raise NotImplementedError

    def compose(self, factors: Sequence[Tensor]) -> Tensor:
        """The weight composed from the given factors, in the shape that the ordinary layer stores. It is differentiable.

        Factors of several layers with equal shapes may be stacked. Their leading dimensions, equal in all factors, are then
        leading dimensions of the weight. The weight must therefore depend only on the factors and their shapes, and on no other
        state of the layer.
        """
        raise NotImplementedError

    def weight_in_use(self) -> Tensor:
        """The weight for this forward pass: the one that an active Composition made, or :meth:`to_dense`."""
        return self.to_dense() if self._composed is None else self._composed

    def chain(self) -> tuple[nn.Parameter, ...]:
        """The factors if their matrix product is the unrolled weight, otherwise an empty tuple.

        Decay treats chains of equal shapes as one batch.
        """
        return ()

    def matrices(self) -> tuple[Tensor, ...]:
        """Matrices whose product is the unrolled weight: the factors of a chain, or the dense matrix alone.

        Matrices of a grouped convolution have a leading dimension of groups: the blocks of block-diagonal matrices.
        """
        return self.chain() or (linalg.as_matrix(self.to_dense()),)

    def map_factors(self, function: Callable[[nn.Parameter], Tensor]) -> tuple[Tensor, ...]:
        """Apply a function, such as one that returns the gradient, to the Parameter of each factor."""
        return tuple(map(function, self.factors()))

    def squared_norm(self) -> Tensor:
        """||weight||_F^2, differentiable, in the dtype of the factors. A subclass may compute it without forming the weight."""
        return self.to_dense().square().sum()

    def frobenius_grads(self) -> list[Tensor]:
        """Gradients of 1/2 ||weight||_F^2 with respect to each factor, zero for frozen ones.

        They are computed by autograd of :meth:`squared_norm`. A subclass may override this with a closed form.
        """
        grads = [torch.zeros_like(factor) for factor in self.factors()]
        wanted = [index for index, factor in enumerate(self.factors()) if factor.requires_grad]
        if wanted:
            with torch.enable_grad():
                penalty = self.squared_norm() / 2
                found = torch.autograd.grad(penalty, [self.factors()[index] for index in wanted])
            for index, grad in zip(wanted, found, strict=True):
                grads[index] = grad
        return grads

    def frobenius_grad_products(self) -> list[tuple[Tensor, ...]]:
        """The gradients of :meth:`frobenius_grads`, each as matrices to multiply. By default each is one matrix."""
        return [(grad,) for grad in self.frobenius_grads()]

    @property
    def weight(self) -> Tensor:
        shape = None if tracing() else self.weight_shape()
        return self.to_dense() if shape is None else ComposedWeight.of(self, shape)

    def weight_shape(self) -> torch.Size | None:
        """Shape of the weight. If a subclass defines this and :meth:`compose`, ``.weight`` is composed only when it is used."""
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__}.weight is the product of its factors and cannot be assigned: "
                "change the factors, or densify_ the model first"
            )
        super().__setattr__(name, value)


def tracing() -> bool:
    """Whether torch.compile, torch.jit.trace or a transform of torch.func is reading the code."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


class FactorizedMatrix(Factorized):
    """Base class of layers whose weight unrolls to one matrix, U V^T (``depth`` 2) or U M V^T (``depth`` 3).

    Parameters are ``u`` (m, r), ``vt`` (r, n) and, at depth 3, ``m`` (r, r) between them. With groups, each group has its own
    matrix and factors, and the Parameters have a leading dimension of groups.

    ``own_attributes`` are the names of the attributes that the layer was created with. Any others were added later.
    """

    def _create(
        self, rows: int, columns: int, rank: int, depth: int, bias: int | None, device: Any, dtype: Any, groups: int = 1
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if depth not in (2, 3):
            raise ValueError(f"depth must be 2 (U V^T) or 3 (U M V^T), got {depth}")
        self.rank, self.depth = rank, depth
        batch = () if groups == 1 else (groups,)
        self.u = nn.Parameter(torch.empty(*batch, rows, rank, device=device, dtype=dtype))
        if depth == 3:
            self.m = nn.Parameter(torch.empty(*batch, rank, rank, device=device, dtype=dtype))
        self.vt = nn.Parameter(torch.empty(*batch, rank, columns, device=device, dtype=dtype))
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.zeros(bias, device=device, dtype=dtype))
        self.own_attributes = frozenset(vars(self)) | {"own_attributes", "_composed"}
        if not self.u.is_meta:  # random initialization on meta would load torch's compiler, which takes seconds
            self.reset_parameters()

    def reset_factors(self) -> None:
        """Regular initialization: Kaiming normal on U and V^T separately, the identity for M."""
        for outer in (self.u, self.vt):
            for matrix in _groups(outer):
                nn.init.kaiming_normal_(matrix)
        if self.depth == 3:
            for matrix in _groups(self.m):
                nn.init.eye_(matrix)

    def reset_parameters(self) -> None:
        """Regular initialization of the factors, zero for the bias."""
        self.reset_factors()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def factors(self) -> tuple[nn.Parameter, ...]:
        return (self.u, self.vt) if self.depth == 2 else (self.u, self.m, self.vt)

    def chain(self) -> tuple[nn.Parameter, ...]:
        return self.factors()

    def set_factors(self, *factors: Tensor) -> None:
        """Copy values into the factors, left to right. Raises ValueError if their number or shapes differ."""
        own = self.factors()
        given, expected = [tuple(f.shape) for f in factors], [tuple(f.shape) for f in own]
        if given != expected:
            raise ValueError(f"{type(self).__name__} has factors of shapes {expected}, got {given}")
        with torch.no_grad():
            for parameter, value in zip(own, factors, strict=True):
                parameter.copy_(value)

    def compose(self, factors: Sequence[Tensor]) -> Tensor:
        return linalg.compose(factors)

    def to_dense(self) -> Tensor:
        return self.compose(self.factors())

    def weight_in_use(self) -> Tensor:
        return self.compose(self._two_factors()) if self._composed is None else self._composed

    def frobenius_grads(self) -> list[Tensor]:
        return linalg.frobenius_grads(self.factors())

    def frobenius_grad_products(self) -> list[tuple[Tensor, ...]]:
        return linalg.frobenius_grad_products(self.factors())

    def _two_factors(self) -> tuple[Tensor, Tensor]:
        """The weight as two factors. M is multiplied into the smaller of the outer factors."""
        if self.depth == 2:
            return self.u, self.vt
        if self.u.shape[-2] < self.vt.shape[-1]:
            return self.u @ self.m, self.vt
        return self.u, self.m @ self.vt

    def _dense_layer(self, kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        """An ordinary layer with this weight and bias, and with this layer's device, dtype, mode and requires_grad."""
        if kind is not nn.Embedding:
            kwargs["bias"] = self.bias is not None
        layer = nn.utils.skip_init(kind, *args, **kwargs, device=self.u.device, dtype=self.u.dtype)
        layer.train(self.training)
        with torch.no_grad(), linalg.outside_autocast(self.u.device):
            layer.weight.copy_(self.to_dense())
        layer.weight.requires_grad_(any(factor.requires_grad for factor in self.factors()))
        if self.bias is not None:
            layer.bias = self.bias
        return layer


def _groups(factor: Tensor) -> list[Tensor]:
    """The matrices of the groups, which share the memory of the factor."""
    return [factor.detach()] if factor.ndim == 2 else list(factor.detach())


def _resolve_contraction(contraction: Contraction, thin_cost: int, composed_cost: int) -> str:
    if contraction not in ("auto", "thin", "composed"):
        raise ValueError(f"contraction must be 'auto', 'thin' or 'composed', got {contraction!r}")
    if contraction == "auto":
        return "thin" if thin_cost < composed_cost else "composed"
    return contraction


class FactorizedLinear(FactorizedMatrix):
    """Linear layer with weight (out, in) = U V^T or U M V^T.

    ``contraction`` is how the layer applies its factors: "thin" multiplies the input by V^T and then by U, and "composed"
    forms the weight first. "auto" chooses the one with fewer multiply-adds per sample: r (in + out) for thin, in * out for
    composed.

    Shapes: input (..., in_features), output (..., out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        depth: int = 2,
        contraction: Contraction = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        thin = rank * (in_features + out_features)
        self.contraction = _resolve_contraction(contraction, thin, in_features * out_features)
        self.contraction_is_automatic = contraction == "auto"
        self._create(out_features, in_features, rank, depth, out_features if bias else None, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        if self.contraction == "composed":
            return F.linear(input, self.weight_in_use(), self.bias)
        u, vt = self._two_factors()
        return F.linear(F.linear(input, vt), u, self.bias)

    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def to_layer(self) -> nn.Module:
        return self._dense_layer(nn.Linear, self.in_features, self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, depth={self.depth}, "
            f"bias={self.bias is not None}, contraction={self.contraction}"
        )


class FactorizedTransposedLinear(FactorizedLinear):
    """Linear layer whose ordinary form stores the weight as (in, out): transformers' ``Conv1D``, as in GPT-2.

    The factors are those of :class:`FactorizedLinear`, so U V^T = weight^T. ``dense_class(out_features, in_features)`` creates
    the ordinary layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        dense_class: Callable[[int, int], nn.Module],
        depth: int = 2,
        contraction: Contraction = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        options: dict[str, Any] = {"depth": depth, "contraction": contraction, "device": device, "dtype": dtype}
        super().__init__(in_features, out_features, rank, bias, **options)
        self.dense_class = dense_class
        self.own_attributes |= {"dense_class"}

    def compose(self, factors: Sequence[Tensor]) -> Tensor:
        return super().compose(factors).mT

    def weight_shape(self) -> torch.Size:
        return torch.Size((self.in_features, self.out_features))

    def forward(self, input: Tensor) -> Tensor:
        if self.contraction == "composed":
            return F.linear(input, self.weight_in_use().mT, self.bias)
        return super().forward(input)

    def to_layer(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # its random initialization is not used
            layer = self.dense_class(self.out_features, self.in_features)
        trainable = any(factor.requires_grad for factor in self.factors())
        with linalg.outside_autocast(self.u.device):
            layer.weight = nn.Parameter(self.to_dense().detach().contiguous(), requires_grad=trainable)
        layer.bias = self.bias
        return layer.train(self.training)


class FactorizedEmbedding(FactorizedMatrix):
    """Embedding with table (num_embeddings, embedding_dim) = U V^T or U M V^T. The padding row is always zero.

    If another layer that shares the factors (tied weights) uses the row, ``padding_row_is_shared`` is true. The padding row
    then has the values that the other layer gives it. As in torch, this layer passes no gradient to the row, or through it to
    V^T.

    ``contraction`` is how rows are looked up: "thin" looks them up in U and multiplies by V^T, and "composed" looks them up in
    the composed table. "auto" chooses thin.

    Shapes: input (...) of integers, output (..., embedding_dim).
    """

    padding_row_is_shared = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        *,
        depth: int = 2,
        contraction: Contraction = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx must be one of the {num_embeddings} rows, got {padding_idx}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx if padding_idx is None else padding_idx % num_embeddings
        self.contraction = _resolve_contraction(contraction, 0, 1)
        self.contraction_is_automatic = contraction == "auto"
        self._create(num_embeddings, embedding_dim, rank, depth, None, device, dtype)

    def reset_factors(self) -> None:
        super().reset_factors()
        self._zero_padding()

    def set_factors(self, *factors: Tensor) -> None:
        super().set_factors(*factors)
        self._zero_padding()

    def _zero_padding(self) -> None:
        # The row stays zero: F.embedding gives this row of U no gradient, and the decay of a zero row is zero.
        if self.padding_idx is not None and not self.padding_row_is_shared:
            with torch.no_grad():
                self.u[self.padding_idx].zero_()

    def forward(self, input: Tensor) -> Tensor:
        if self.contraction == "composed":
            return F.embedding(input, self.weight_in_use(), self.padding_idx)
        u, vt = self._two_factors()
        output = F.embedding(input, u, self.padding_idx) @ vt
        if self.padding_idx is None or not self.padding_row_is_shared:
            return output
        return torch.where((input == self.padding_idx).unsqueeze(-1), output.detach(), output)

    def weight_shape(self) -> torch.Size:
        return torch.Size((self.num_embeddings, self.embedding_dim))

    def to_layer(self) -> nn.Module:
        return self._dense_layer(nn.Embedding, self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, depth={self.depth}, "
            f"padding_idx={self.padding_idx}, contraction={self.contraction}"
        )


class _FactorizedConv(FactorizedMatrix):
    """The common part of convolutions in one and two dimensions. A sequence is treated as an image of height 1."""

    _dense: type[nn.Module]  # the ordinary layer
    _sides: Callable[[Any], tuple[int, ...]]  # expands one number to one per side

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        groups: int = 1,
        depth: int = 2,
        contraction: Contraction = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = map(self._sides, (kernel_size, stride, dilation))
        self.padding = padding if isinstance(padding, str) else self._sides(padding)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups must divide {in_channels} input and {out_channels} output channels, got {groups}")
        if isinstance(padding, str) and (padding not in ("same", "valid") or (padding == "same" and max(self.stride) != 1)):
            raise ValueError(
                f"padding must be numbers, 'valid', or 'same' at stride 1, got {padding!r} at stride {self.stride}"
            )
        if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(f"padding_mode must be zeros, reflect, replicate or circular, got {padding_mode!r}")
        self.padding_mode = padding_mode
        kh, kw = kernel = _plane(self.kernel_size, 1)
        strides = _plane(self.stride, 1)
        unpadded = [sum(pad) == 0 for pad in self._split_padding()]
        sides = zip(kernel, strides, unpadded, strict=True)
        self._slices = [stride if kernel == 1 and free else 1 for kernel, stride, free in sides]
        rows = strides[0] // self._slices[0]
        thin = rank * (in_channels * kw * rows + out_channels * kh)
        self.contraction = _resolve_contraction(contraction, thin, in_channels // groups * out_channels * kh * kw)
        self.contraction_is_automatic = contraction == "auto"
        shape = (out_channels // groups * kh, in_channels // groups * kw)
        self._create(*shape, rank, depth, out_channels if bias else None, device, dtype, groups)

    def _split_padding(self) -> list[tuple[int, int]]:
        """Padding (before, after) of the rows and of the columns."""
        if self.padding == "same":
            sides = zip(_plane(self.dilation, 1), _plane(self.kernel_size, 1), strict=True)
            totals = [d * (k - 1) for d, k in sides]
            return [(total // 2, total - total // 2) for total in totals]
        if isinstance(self.padding, str):  # "valid"
            return [(0, 0), (0, 0)]
        return [(p, p) for p in _plane(self.padding, 0)]

    def _convolve(self, input: Tensor) -> Tensor:
        """The convolution of an input (..., channels, H, W)."""
        (top, bottom), (left, right) = self._split_padding()
        pad_h, pad_w = top, left
        if self.padding_mode != "zeros":
            input = F.pad(input, (left, right, top, bottom), mode=self.padding_mode)
            pad_h = pad_w = 0
        elif top != bottom or left != right:  # 'same' with an even kernel
            input = F.pad(input, (left, right, top, bottom))
            pad_h = pad_w = 0
        kh, kw = _plane(self.kernel_size, 1)
        (stride_h, stride_w), (dilation_h, dilation_w) = _plane(self.stride, 1), _plane(self.dilation, 1)
        slice_h, slice_w = self._slices
        input = input[..., ::slice_h, ::slice_w]
        stride_h, stride_w = stride_h // slice_h, stride_w // slice_w
        if self.contraction == "composed":
            kernel = self.weight_in_use()
            kernel = self._laid_out(kernel if kernel.ndim == 4 else kernel.unsqueeze(-2))
            strides, dilations = (stride_h, stride_w), (dilation_h, dilation_w)
            return F.conv2d(input, kernel, self.bias, strides, (pad_h, pad_w), dilations, self.groups)
        u, vt = self._two_factors()
        across = vt.view(self.groups * self.rank, self.in_channels // self.groups, 1, kw)
        down = self._laid_out(u.view(self.out_channels, kh, self.rank).transpose(1, 2).unsqueeze(-1))
        hidden = F.conv2d(input, across, None, (1, stride_w), (0, pad_w), (1, dilation_w), self.groups)
        return F.conv2d(hidden, down, self.bias, (stride_h, 1), (pad_h, 0), (dilation_h, 1), self.groups)

    def _laid_out(self, kernel: Tensor) -> Tensor:
        """The kernel, made contiguous if there are groups.

        With groups and channels-last input, torch's CPU convolutions (torch 2.14) read wrong entries of a strided kernel.
        """
        return kernel if self.groups == 1 else kernel.contiguous()

    def _compose_kernel(self, factors: Sequence[Tensor]) -> Tensor:
        """The two-dimensional kernel (..., out, in / groups, kh, kw)."""
        matrix = linalg.compose(factors)
        return linalg.roll(matrix if self.groups == 1 else matrix.flatten(-3, -2), _plane(self.kernel_size, 1))

    def weight_shape(self) -> torch.Size:
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    def to_layer(self) -> nn.Module:
        return self._dense_layer(
            self._dense,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )

    def extra_repr(self) -> str:
        groups = f"groups={self.groups}, " if self.groups > 1 else ""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, depth={self.depth}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, {groups}bias={self.bias is not None}, "
            f"contraction={self.contraction}"
        )


def _plane(sides: tuple[int, ...], height: int) -> tuple[int, int]:
    """Height and width. If only a width is given, the height is ``height``."""
    return (sides[0], sides[1]) if len(sides) == 2 else (height, sides[0])


class FactorizedConv2d(_FactorizedConv):
    """Convolution whose kernel unrolls to (out * kh, in * kw) = U V^T or U M V^T (paper, section 2).

    ``contraction`` is how the layer applies its factors: "thin" runs a (1, kw) convolution to r channels and a (kh, 1)
    convolution to the output, and "composed" forms the kernel and runs one convolution. "auto" chooses the one with fewer
    multiply-adds per output position: r (in * kw * vertical stride + out * kh) for thin, in * out * kh * kw / groups for
    composed. The vertical stride counts because the first thin convolution runs before it removes rows. Composing the kernel
    is not counted, because its cost does not grow with the batch.

    Along a side with kernel size 1 and no padding, the stride is implemented by slicing the input. This is less work, and it
    avoids oneDNN's strided 1x1 convolution, which corrupts memory below 16 channels (oneDNN issue 6035).

    With ``groups``, each group has its own factors of rank r, and its kernel unrolls to (out / groups * kh, in / groups * kw).

    Shapes: input (N, in_channels, H, W) or (in_channels, H, W), output as for ``nn.Conv2d``.
    """

    _dense, _sides = nn.Conv2d, staticmethod(_pair)

    def forward(self, input: Tensor) -> Tensor:
        return self._convolve(input)

    def compose(self, factors: Sequence[Tensor]) -> Tensor:
        return self._compose_kernel(factors)


class FactorizedConv1d(_FactorizedConv):
    """Convolution over a sequence, with a kernel that unrolls to (out, in * k) = U V^T or U M V^T.

    ``contraction`` and ``groups`` are as in :class:`FactorizedConv2d` with a kernel of height 1.

    Shapes: input (N, in_channels, L) or (in_channels, L), output as for ``nn.Conv1d``.
    """

    _dense, _sides = nn.Conv1d, staticmethod(_single)

    def forward(self, input: Tensor) -> Tensor:
        return self._convolve(input.unsqueeze(-2)).squeeze(-2)

    def compose(self, factors: Sequence[Tensor]) -> Tensor:
        return self._compose_kernel(factors).squeeze(-2)
