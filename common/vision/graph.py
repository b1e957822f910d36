"""A training step as one CUDA graph: recorded once, then launched as a whole instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_WARM_UP = 3  # steps before recording, in which libraries and optimizer allocate what they keep

Step = Callable[[], None]


def record(step: Step) -> Step:
    """Record a step on the present GPU as a CUDA graph, without running it; returns what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class NotRecorded(Exception):
    """A step that cannot be a CUDA graph; tells why."""


class StepGraph:
    """A training step that is recorded once and replayed from then on.

    The step must take everything that changes between steps from tensors that stay where they are, and leave its results in
    such tensors; nothing in it may wait for the GPU. The first steps are run as they are, on a stream of their own. Where a
    tensor has moved since recording (a Parameter was replaced, momentum was dropped), the step is recorded anew: a replay
    would read and write the old one.

    step:    makes one training step.
    memory:  the tensors that outlive a step and that it reads or writes: parameters, buffers, momentum, data.
    record:  records a step; returns what replays it.

    Raises :class:`NotRecorded` where the step cannot be recorded; no step was made then.
    """

    def __init__(self, step: Step, memory: Callable[[], Iterable[Tensor]], *, record: Callable[[Step], Step] = record) -> None:
        self._step, self._memory, self._record = step, memory, record
        self._replay: Step | None = None
        self._addresses: list[tuple[int, bool]] = []
        self._warm = 0
        self.recordings = 0

    def __call__(self) -> None:
        """Make one step."""
        if self._replay is not None and self._addresses != self._present():
            self._replay, self._warm = None, 0
        if self._replay is None and self._warm < _WARM_UP:
            self._warm += 1
            _on_a_stream_of_its_own(self._step)
            return
        if self._replay is None:
            try:
                self._replay = self._record(self._step)
            except Exception as error:  # whatever a step does that a graph cannot hold, CUDA has an error of its own for it
                cause: BaseException = error
                while cause.__context__ is not None:  # ending the recording fails, too, and says less
                    cause = cause.__context__
                raise NotRecorded(f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}") from error
            self._addresses = self._present()
            self.recordings += 1
        self._replay()

    def _present(self) -> list[tuple[int, bool]]:
        """Where the step's memory is, and what of it is trained."""
        return [(tensor.data_ptr(), tensor.requires_grad) for tensor in self._memory()]


def _on_a_stream_of_its_own(step: Step) -> None:
    if not torch.cuda.is_available():
        step()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
