"""Measure which contraction of a factorized layer is faster, on the GPU on which it will run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .composition import Composition
from .layers import Factorized

_REPEATS, _TURNS = 10, 5  # launches timed together, and how many times


@dataclass(frozen=True)
class Measured:
    """The time of each contraction of some equal layers, forward and backward, in milliseconds per layer."""

    layers: tuple[str, ...]
    description: str
    milliseconds: dict[str, float]

    @property
    def faster(self) -> str:
        return min(self.milliseconds, key=self.milliseconds.__getitem__)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {time:.3f} ms" for name, time in self.milliseconds.items())
        return f"{self.faster}: {len(self.layers)} x {self.description} ({times})"


def automatic_layers(model: nn.Module) -> dict[str, Factorized]:
    """The layers whose contraction was given as "auto", by name."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, Factorized))
    return {name: layer for name, layer in layers if layer.contraction_is_automatic}


def set_contractions_(model: nn.Module, choices: dict[str, str]) -> None:
    """Set the contractions of the named layers. Raises ValueError for any other choice, or a layer not made with "auto"."""
    layers = automatic_layers(model)
    for name, choice in choices.items():
        if name not in layers or choice not in ("thin", "composed"):
            known = f"one of the {len(layers)} layers whose contraction is 'auto'"
            raise ValueError(f"expected 'thin' or 'composed' for {known}, got {choice!r} for {name!r}")
        layers[name].contraction = choice


def measure_contractions(
    model: nn.Module, input: Tensor, *, dtype: torch.dtype | None = None, milliseconds: Callable[..., float] | None = None
) -> list[Measured]:
    """Time both contractions of each distinct layer made with "auto" contraction, on its input from one batch.

    The model runs once, in evaluation mode and without gradients, to record those inputs. Layers of the same kind, shape and
    input shape are measured together, because they are composed together. The model does not change; apply a choice with
    :func:`set_contractions_`.

    dtype:         the dtype in which autocast computes (None: no autocast).
    milliseconds:  times a function without arguments. The default records it as a CUDA graph and times replays, because
                   training steps are replayed, too, and the cost of launches would hide that of the kernels.
    """
    alike: dict[Any, dict[str, Factorized]] = {}
    inputs: dict[Any, Tensor] = {}
    for name, layer, given in _inputs(model, input, dtype):
        kind = (type(layer), layer.extra_repr(), tuple(given.shape), given.dtype, given.stride())
        alike.setdefault(kind, {})[name] = layer
        inputs.setdefault(kind, given)
    found = []
    for kind, layers in alike.items():
        first = next(iter(layers.values()))
        before = first.contraction
        times = {}
        try:
            for choice in ("thin", "composed"):
                for layer in layers.values():
                    layer.contraction = choice
                call = _Pass(list(layers.values()), inputs[kind], dtype)
                times[choice] = (milliseconds or replay_milliseconds)(call) / len(layers)
        finally:
            for layer in layers.values():
                layer.contraction = before
        shapes = " ".join("x".join(map(str, factor.shape)) for factor in first.factors())
        description = f"{type(first).__name__} of {shapes} on {'x'.join(map(str, inputs[kind].shape))}"
        found.append(Measured(tuple(layers), description, times))
    return found


@torch.no_grad()
def _inputs(model: nn.Module, input: Tensor, dtype: torch.dtype | None) -> Iterator[tuple[str, Factorized, Tensor]]:
    """Name, layer and first input of each layer to measure, in the order in which the model uses them."""
    seen: dict[str, Tensor] = {}
    layers = automatic_layers(model)

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(name, (args[0] if args else kwargs["input"]).detach())

        return hook

    handles = [layer.register_forward_pre_hook(remember(name), with_kwargs=True) for name, layer in layers.items()]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.autocast(input.device.type, dtype, enabled=dtype is not None):
            model(input)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return ((name, layers[name], given) for name, given in seen.items())


class _Pass:
    """Forward and backward pass of each of the layers, which form one group if they are composed."""

    def __init__(self, layers: list[Factorized], input: Tensor, dtype: torch.dtype | None) -> None:
        self.layers, self.dtype, self.device_type = layers, dtype, input.device.type
        self.input = input.requires_grad_(input.is_floating_point())
        holder = nn.ModuleList(layers)
        self.composition = Composition(holder)
        trained = [parameter for parameter in holder.parameters() if parameter.requires_grad]
        self.wanted = trained + [self.input] * self.input.requires_grad

    def __call__(self) -> None:
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None), self.composition.active(self.dtype):
            outputs = [layer(self.input) for layer in self.layers]
            if self.wanted:
                seeds = [output.detach() for output in outputs]
                torch.autograd.grad(outputs, self.wanted, seeds, allow_unused=True)  # a layer may hold Parameters of the user


def replay_milliseconds(function: Callable[[], Any]) -> float:
    """Milliseconds that a function takes on the current GPU, recorded as a CUDA graph and replayed.

    This is the minimum of several measurements, because other runs may share the GPU.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
        graph.capture_begin()
        try:
            function()
        finally:
            graph.capture_end()
        graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(_TURNS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            for _ in range(_REPEATS):
                graph.replay()
            mark.record()
        stream.synchronize()
    times = [start.elapsed_time(end) / _REPEATS for start, end in itertools.pairwise(marks)]
    torch.cuda.current_stream().wait_stream(stream)
    return min(times)
