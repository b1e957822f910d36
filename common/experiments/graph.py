"""A training step as one CUDA graph: recorded once, then launched as a whole instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3  # steps before recording, in which libraries and optimizer allocate what they keep

Step = Callable[[], None]


def record(step: Step, stream: Any) -> Step:
    """Record a step on the present GPU as a CUDA graph, without running it; returns what replays it."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream):
            step()
    except BaseException:
        torch.cuda.set_stream(before)  # torch leaves the other one where ending the recording fails, too
        raise
    return graph.replay


class NotRecorded(Exception):
    """A step that cannot be a CUDA graph; tells why."""


class StepGraph:
    """A training step that is recorded once and replayed from then on.

    The step must take everything that changes between steps from tensors that stay where they are, and leave its results in
    such tensors; nothing in it may wait for the GPU. The first steps are run as they are. Warm-up and recording share a stream
    of their own, because what autograd keeps from one step to the next belongs to a stream. Where something of ``memory`` is
    no longer as it was recorded (a Parameter or a module was replaced, momentum was dropped, a coefficient changed), the step
    is recorded anew: a replay would go on with the old one.

    step:    makes one training step.
    memory:  what outlives a step and that it reads or writes: tensors, such as parameters, buffers and momentum, and numbers
             that a recording keeps.
    record:  records a step on a stream; returns what replays it.

    Raises :class:`NotRecorded` where the step cannot be recorded; no step was made then.
    """

    def __init__(
        self, step: Step, memory: Callable[[], Iterable[Any]], *, record: Callable[[Step, Any], Step] = record
    ) -> None:
        self._step, self._memory, self._record = step, memory, record
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._replay: Step | None = None
        self._recorded: list[Any] = []  # the memory, as it was recorded
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
        except Exception as error:  # whatever a step does that a graph cannot hold, CUDA has an error of its own for it
            cause = causes[0] if causes else error  # ending the recording fails, too, and says less
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
        """Where the tensors are, and which of them are trained; the numbers as they are."""
        return [(each.data_ptr(), each.requires_grad) if isinstance(each, Tensor) else each for each in self._memory()]
