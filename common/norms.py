"""Norms of a model's layers during training: metrics of each epoch, a record of every step, and its replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import donors, linalg
from .layers import Factorized, FactorizedMatrix


def _matrices(layer: nn.Module) -> tuple[Tensor, ...]:
    """Matrices whose product is the layer's unrolled weight. For an ordinary layer this is the unrolled weight alone.

    Groups of a convolution are batch dimensions.
    """
    if isinstance(layer, Factorized):
        return layer.matrices()
    if donors.kind_of(layer) is not None:
        return (donors.unroll(layer),)
    assert isinstance(layer.weight, Tensor)
    return (linalg.as_matrix(layer.weight),)


def _norm(factors: Sequence[Tensor]) -> Tensor:
    """||W||_F, a scalar. Matrices of groups are treated as the blocks of one block-diagonal matrix."""
    norm = linalg.frobenius_norm(factors)
    return torch.linalg.vector_norm(norm) if norm.ndim else norm


@torch.no_grad()
def norm_metrics(layers: Mapping[str, nn.Module], lr: float) -> dict[str, float]:
    """Means over the layers of the quantities in the paper's figures: norms, bound, non-orthogonality, effective step sizes.

    ``effective_lr`` is lr / ||W||_F^2, the effective step size of a weight followed by a normalization (paper, claim 3.1).
    ``effective_lr_norm`` is lr / ||W||_F, as the released code plots it. Ordinary layers have no bound and no
    non-orthogonality. If no layer is factorized, those keys are absent. A layer with a value that is not finite makes the
    Frobenius norm NaN and is left out of the other means.
    """
    values: dict[str, list[Tensor]] = {}
    for layer in layers.values():
        factors = [linalg.to_float64(matrix) for matrix in _matrices(layer)]
        if not all(factor.isfinite().all() for factor in factors):
            values.setdefault("frobenius_norm", []).append(torch.tensor(float("nan")))
            continue
        norm = _norm(factors)
        row = {
            "frobenius_norm": norm,
            "nuclear_norm": linalg.nuclear_norm(factors).sum(),
            "effective_lr": lr / norm.square(),
            "effective_lr_norm": lr / norm,
        }
        if len(factors) > 1:
            row["nuclear_norm_bound"] = linalg.nuclear_norm_bound(factors).sum()
            outer = linalg.non_orthogonality(factors[0]) + linalg.non_orthogonality(factors[-1].mT)
            row["non_orthogonality"] = outer / 2
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    return {key: torch.stack(column).mean().item() for key, column in values.items()}


class NormRecorder:
    """Records ||W||_F of each layer after every optimizer step."""

    def __init__(self, layers: Mapping[str, Factorized]) -> None:
        self.layers = dict(layers)
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        norms = [_norm([matrix.float() for matrix in layer.matrices()]) for layer in self.layers.values()]
        self._norms.append(torch.stack(norms))

    def state_dict(self) -> dict[str, Any]:
        """Layer names, and norms of shape (steps, layers)."""
        norms = torch.stack(self._norms).cpu() if self._norms else torch.zeros(0, len(self.layers))
        return {"layers": list(self.layers), "norms": norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = next(iter(self.layers.values())).factors()[0].device
        self._norms = list(state["norms"].to(device))


def load_record(path: Path) -> dict[str, Any]:
    """The record of norms in a file that ``--dump-frobnorms`` wrote. Raises ValueError for any other or a missing file."""
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        return {"layers": list(record["layers"]), "norms": record["norms"], "path": path}
    except FileNotFoundError as error:
        raise ValueError(f"--normalize {path} does not exist: a run with --dump-frobnorms writes frobnorms.tensor") from error
    except Exception as error:
        raise ValueError(f"--normalize {path} is not a file that --dump-frobnorms wrote") from error


class NormReplay:
    """Scales the factors of each layer by one number after every optimizer step, so that ||W||_F is that of a recorded run.

    Raises ValueError, before any training, if the record has other layers or fewer than ``steps`` steps.
    """

    def __init__(
        self, layers: Mapping[str, FactorizedMatrix], record: Mapping[str, Any], steps: int, device: torch.device
    ) -> None:
        names, norms, path = record["layers"], record["norms"], record["path"]
        if names != list(layers):
            lacking = [name for name in layers if name not in names] or ["none"]
            unknown = [name for name in names if name not in layers] or ["none"]
            raise ValueError(
                f"--normalize {path} is of another model: it has {len(names)} layers and this model {len(layers)}; "
                f"missing there: {', '.join(lacking)}; unknown here: {', '.join(unknown)}"
            )
        if len(norms) < steps:
            raise ValueError(f"--normalize {path} holds the norms of {len(norms)} steps, and this run makes {steps}")
        self.layers, self._norms = layers, norms.to(device)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for layer, norm in zip(self.layers.values(), self._norms[step], strict=True):
            factors = layer.factors()
            if factors[0].ndim > 2:  # each group keeps its share of the norm
                own = linalg.frobenius_norm([linalg.to_float64(factor) for factor in factors])
                norm = own * (norm / torch.linalg.vector_norm(own).clamp_min(torch.finfo(own.dtype).tiny))
            layer.set_factors(*linalg.rescale(factors, norm))
