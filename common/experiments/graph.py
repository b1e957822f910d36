"""A training step as one CUDA graph: it is recorded once, then launched as a whole instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3  # steps before the recording, in which libraries and the optimizer allocate the memory that they keep

Step = Callable[[], None]


def record(step: Step, stream: Any) -> Step:
    """Record a step as a CUDA graph on the current GPU, without running it. Returns a function that replays it."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream):
            step()
    except BaseException:
        torch.cuda.set_stream(before)  # torch does not restore it if ending the recording fails as well
        raise
    return graph.replay


class NotRecorded(Exception):
    """Raised for a step that cannot be recorded as a CUDA graph. The message says why."""


class StepGraph:
    """A training step that is recorded once and then replayed.

    The step must read everything that changes between steps from tensors that keep their addresses, and must write its results
    to such tensors. Nothing in it may wait for the GPU. The first few steps, the warm-up, run without recording. Warm-up and
    recording share a separate stream, because the state that autograd keeps between steps belongs to a stream.

    The step is recorded again if anything in ``memory`` has changed since the recording, for example if a Parameter or a
    module was replaced, momentum was dropped or a coefficient changed. A replay would still use the old values.

    step:    makes one training step.
    memory:  returns everything that outlives a step and that the step reads or writes: tensors, such as parameters, buffers
             and momentum, and the numbers that a recording fixes.
    record:  records a step on a stream, and returns a function that replays it.

    A call raises :class:`NotRecorded` if the step cannot be recorded. That call has then made no step.
    """

    def __init__(
        self, step: Step, memory: Callable[[], Iterable[Any]], *, record: Callable[[Step, Any], Step] = record
    ) -> None:
        self._step, self._memory, self._record = step, memory, record
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._replay: Step | None = None
        self._recorded: list[Any] = []  # the memory at the time of the recording
        self._warm = 0
        self.recordings = 0

    def __call__(self) -> None:
        """Make one step."""
        if self._replay is not None and self._recorded != self._present():
            self._replay, self._warm = None, 0
        if self._replay is None and self._warm < _WARM_UP:
            self._warm += 1
            self._on_own_stream()
            return
        if self._replay is None:
            self._replay = self._recording()
            self._recorded = self._present()
            self.recordings += 1
        self._replay()

    def _recording(self) -> Step:
        causes: list[Exception] = []

        def step() -> None:
            try:
                self._step()
            except Exception as error:
                causes.append(error)
                raise

        try:
            return self._record(step, self._stream)
        except Exception as error:  # CUDA raises a different error for each operation that a graph cannot hold
            cause = causes[0] if causes else error  # ending the recording fails as well, with a less helpful message
            first = (str(cause).strip().splitlines() or [""])[0]
            raise NotRecorded(f"{type(cause).__name__}: {first}".removesuffix(": ")) from error

    def _on_own_stream(self) -> None:
        if self._stream is None:
            self._step()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _present(self) -> list[Any]:
        """The memory in comparable form: the address of each tensor and whether it is trained; numbers unchanged."""
        return [(each.data_ptr(), each.requires_grad) if isinstance(each, Tensor) else each for each in self._memory()]
