"""Devices and processes: one process, or the processes that torchrun starts, one a device."""

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
    """Device of ``--device``: auto, cpu, cuda, cuda:1, mps, or the number of a GPU; ValueError where it is absent."""
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
            raise ValueError(f"--device {flag} asks for a CUDA GPU and this machine has {count}: use --device cpu")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps asks for Apple's GPU and this machine has none: use --device cpu")
    elif device.type not in ("cpu", "mps"):
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:N, mps or a GPU's number, got {flag!r}")
    return device


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, averaging its gradients over the processes."""
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
        """The smallest step of all processes, where -1 stands for none."""
        value = torch.tensor(step if step >= 0 else 2**62, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return -1 if value == 2**62 else int(value)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the main one's buffers (running statistics), for evaluation."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    @contextmanager
    def main_first(self) -> Generator[None]:
        """Let the main process do the block before the others, such as a download."""
        if not self.main:
            dist.barrier()
        yield
        if self.main and self.world_size > 1:
            dist.barrier()


def has_bfloat16(device: torch.device) -> bool:
    """Whether convolutions of bfloat16 have kernels of their own on the device.

    On a processor without (no AVX-512, for example) torch falls back to loops, which take twelve times as long as float32 for a
    step of ResNet20 and refuse some strides of weights.
    """
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def start(device_flag: str) -> Processes:
    """Join the processes of torchrun where it started this one; else be the only process."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        device = find_device(device_flag)
        if device.type == "cpu":
            prepare_cpu()
        elif device.type == "cuda":
            torch.cuda.set_device(device)  # streams and graphs are of the current one
        return Processes(device)
    local_rank = os.environ.get("LOCAL_RANK", "0")
    flag = local_rank if device_flag == "cuda" or (device_flag == "auto" and torch.cuda.is_available()) else device_flag
    device = find_device(flag)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        prepare_cpu()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(device, dist.get_rank(), world_size)


def prepare_cpu() -> None:
    """Make training on the CPU fast: reuse the memory that tensors free, and compute with no denormal numbers.

    As it is, glibc maps large blocks afresh at every allocation, and the kernel clears them page by page at first touch,
    which takes a good part of a small network's training step. Arithmetic on denormal numbers, below 1.2e-38 in float32, takes
    up to a hundred times as long; they are flushed to zero, in this thread and in those that start after.
    """
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        m_mmap_max, m_trim_threshold = -4, -1  # of glibc's malloc.h; other libraries know neither, or ignore them
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
