"""Devices and processes: a single process, or the processes that torchrun starts, one per device."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def find_device(flag: str) -> torch.device:
    """The device that ``--device`` names: auto, cpu, cuda, cuda:1, mps, or the number of a GPU.

    Raises ValueError if this machine does not have it, or if the name is none of these.
    """
    if flag == "auto":
        flag = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = f"cuda:{flag}" if flag.isdecimal() else flag
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:N, mps or a GPU's number, got {flag!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"--device {flag} asks for a CUDA GPU, but this machine has {count}: use --device cpu")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps asks for an Apple GPU, but this machine has none: use --device cpu")
    elif device.type not in ("cpu", "mps"):
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:N, mps or a GPU's number, got {flag!r}")
    return device


@dataclass(frozen=True)
class Processes:
    """This process and the group of processes that train together."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, wrapped so that its gradients are averaged over the processes."""
        if self.world_size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def first(self, step: int) -> int:
        """The smallest step of all processes. As an argument and as the result, -1 means no step."""
        value = torch.tensor(step if step >= 0 else 2**62, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return -1 if value == 2**62 else int(value)

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the main process's buffers (running statistics) to every process, for evaluation."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    @contextmanager
    def main_first(self) -> Generator[None]:
        """Let the main process run the block, such as a download, before the other processes do."""
        if not self.main:
            dist.barrier()
        yield
        if self.main and self.world_size > 1:
            dist.barrier()


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has native kernels for bfloat16 convolutions.

    On a processor without them (for example, without AVX-512), torch falls back to loops. A training step of ResNet20 then
    takes twelve times as long as in float32, and weights with some strides cause errors.
    """
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def start(device_flag: str) -> Processes:
    """Join the other processes if torchrun started this one. Otherwise this is the only process.

    Raises ValueError as :func:`find_device` does.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Processes(prepare_device(device_flag))
    local_rank = os.environ.get("LOCAL_RANK", "0")
    flag = local_rank if device_flag == "cuda" or (device_flag == "auto" and torch.cuda.is_available()) else device_flag
    device = prepare_device(flag)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(device, dist.get_rank(), world_size)


def prepare_device(flag: str) -> torch.device:
    """The device of ``--device``, ready to train on. Raises ValueError as :func:`find_device` does."""
    device = find_device(flag)
    if device.type == "cpu":
        prepare_cpu()
    elif device.type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs belong to the current device
    return device


def prepare_cpu() -> None:
    """Speed up training on the CPU: reuse the memory that tensors free, and flush denormal numbers to zero.

    By default, glibc maps large blocks again at every allocation, and the kernel clears each page on first access. This takes
    a considerable part of a small network's training step. Arithmetic on denormal numbers, which are below 1.2e-38 in float32,
    takes up to a hundred times as long as on others. They are flushed to zero in this thread and in threads that start later.
    """
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        m_mmap_max, m_trim_threshold = -4, -1  # from glibc's malloc.h; other C libraries lack or ignore them
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def stop() -> None:
    """Leave the process group, if this process has joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()
