"""The process group: this rank among all, its device, and the orderly end."""

import contextlib
import ctypes
import datetime
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from dist_trainer.distributed.cores import cores
from dist_trainer.distributed.gpu import check_hidden, local_rank, own_gpu
from dist_trainer.distributed.processes import launched_by_torchrun
from dist_trainer.distributed.slurm import is_task


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, its local rank, its device, and a gloo group for host data."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    host_group: Any = None
    beat_s: float = 5.0
    """Seconds between two signs of life of rank 0 during long work: well below the timeout of a collective, and below
    the time that a rank has to stop (watchdog.py)."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def alone() -> World:
    """One process on the CPU, without a process group: for commands that train nothing."""
    return World(0, 1, 0, 1, torch.device("cpu"))


def devices() -> int:
    """The number of accelerators of this host, or of cores if there is none."""
    return torch.cuda.device_count() if torch.cuda.is_available() else cores()


def keep_freed_memory() -> None:
    """Let glibc keep what large CPU tensors free instead of asking the kernel for fresh, zeroed pages at every step."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def init_world(timeout_s: float = 660.0) -> World:
    """Join the process group that torchrun's environment describes, or create one with this process alone.

    Collectives wait `timeout_s`.

    NCCL if there are CUDA devices, else gloo. Host data (JSON) always use gloo. Raises LocalError for a rank without a
    GPU where there are some or should be.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", own_gpu(torch.cuda.device_count())), "nccl"
        torch.cuda.set_device(device)
    else:
        check_hidden()
        device, backend = torch.device("cpu"), "gloo"
        keep_freed_memory()
    timeout = datetime.timedelta(seconds=timeout_s)
    device_id = device if device.type == "cuda" else None
    if launched_by_torchrun():
        store, rank, size = next(rendezvous("env://", rank, size, timeout=timeout))
        if size == local_size:
            # After a restart torchrun's store still holds the addresses of the dead ranks (pytorch #135712).
            # The restart count keeps attempts apart. On several hosts each torchrun counts its own, so not there.
            store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
    elif "MASTER_ADDR" in os.environ and size > 1:
        if rank == 0 or (local_rank() == 0 and not is_task()):
            where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
            source = "Slurm's step has them" if is_task() else "WORLD_SIZE and MASTER_ADDR in the environment say"
            print(f"waiting for {size} ranks at {where}, as {source}", file=sys.stderr, flush=True)
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    else:
        rank, size = 0, 1
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device_id)
    host_group = dist.new_group(backend="gloo", timeout=timeout) if backend != "gloo" else None
    return World(rank, size, local_rank(), local_size, device, host_group, min(5.0, timeout_s / 8))


def shutdown_world() -> None:
    """The orderly end. Without the barrier, destroying gloo groups sometimes aborts the process."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
