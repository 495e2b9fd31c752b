"""Who am I among the ranks, and the few collectives that are not the engine's: packed sums, work on rank 0, the end."""

import contextlib
import ctypes
import datetime
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from dist_trainer.distributed.processes import STOP_SIGNALS, cores, die_with_parent
from dist_trainer.distributed.watchdog import beat
from dist_trainer.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, its place on this host, its device, a gloo group for host data."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    host_group: Any = None
    beat_s: float = 60.0
    """How often rank 0 says that it is still at it: well below the time that a collective waits."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def devices() -> int:
    """Accelerators of this host, or its cores where there is none."""
    return torch.cuda.device_count() if torch.cuda.is_available() else cores()


def launched_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def keep_freed_memory() -> None:
    """Let glibc keep what large CPU tensors free instead of asking the kernel for fresh, zeroed pages at every step."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def init(timeout_s: float = 660.0) -> World:
    """Join the process group that torchrun's environment describes, or make one of a single process.

    Collectives wait `timeout_s`.

    NCCL where there are CUDA devices, gloo elsewhere; host data (JSON) always travels by gloo.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}. "
                f"Paste: torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        keep_freed_memory()
    timeout = datetime.timedelta(seconds=timeout_s)
    device_id = device if device.type == "cuda" else None
    if launched_by_torchrun():
        # The agent would end its ranks with SIGTERM; when the agent itself is killed, the kernel does.
        die_with_parent(signal.SIGTERM)
        store, rank, size = next(rendezvous("env://", rank, size, timeout=timeout))
        if size == local_size:
            # After a restart the agent's store still holds the addresses of the dead ranks (pytorch #135712).
            # The restart count keeps attempts apart; on several hosts each agent counts its own, so not there.
            store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
    elif "MASTER_ADDR" in os.environ and size > 1:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    else:
        rank, size = 0, 1
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device_id)
    host_group = dist.new_group(backend="gloo", timeout=timeout) if backend != "gloo" else None
    return World(rank, size, local_rank, local_size, device, host_group, min(60.0, timeout_s / 8))


def shutdown() -> None:
    """The orderly end. Without the barrier, destroying gloo groups aborts the process now and then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def abandon(status: int) -> None:
    """The end after an error: other ranks may be inside a collective, so nothing here may wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def broadcast_json(world: World, value: Any) -> Any:
    """Rank 0's `value` (what JSON can hold) on every rank."""
    if world.size == 1:
        return json.loads(json.dumps(value))
    data = bytearray(json.dumps(value).encode() if world.is_main else b"")
    length = torch.tensor([len(data)])
    dist.broadcast(length, 0, group=world.host_group)
    payload = (
        torch.frombuffer(data, dtype=torch.uint8) if world.is_main else torch.empty(int(length), dtype=torch.uint8)
    )
    dist.broadcast(payload, 0, group=world.host_group)
    return json.loads(bytes(payload.numpy()))


def gather_json(world: World, value: Any) -> list[Any]:
    """Every rank's `value` (what JSON can hold), in the order of ranks, on every rank."""
    data = json.dumps(value).encode()
    if world.size == 1:
        return [json.loads(data)]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=world.host_group)
    longest = max(int(length) for length in lengths)
    padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
    everyone = [torch.empty(longest, dtype=torch.uint8) for _ in range(world.size)]
    dist.all_gather(everyone, padded, group=world.host_group)
    return [json.loads(bytes(each.numpy())) for each in everyone]


def broadcast_tensors(world: World, tensors: Iterable[torch.Tensor]) -> None:
    """Rank 0's values in every rank's `tensors` (in place, the same shapes and order everywhere), by the host."""
    if world.size == 1:
        return
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        dist.broadcast(values, 0, group=world.host_group)
        tensor.detach().copy_(values)


@contextlib.contextmanager
def _still_at_it(world: World) -> Iterator[None]:
    """Rank 0 runs the block; the others wait here until it is through."""
    if not world.is_main:
        yield
        going_on = torch.ones(1)
        while going_on:
            dist.broadcast(going_on, 0, group=world.host_group)
            beat()
        return
    through = threading.Event()

    def say() -> None:
        while not through.wait(world.beat_s):
            beat()
            dist.broadcast(torch.ones(1), 0, group=world.host_group)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        through.set()
        thread.join()
    dist.broadcast(torch.zeros(1), 0, group=world.host_group)


def on_main(world: World, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and give its JSON-able result, or its UserError, to every rank: all go on or none does.

    It may take longer than collectives wait: a thread says now and then that rank 0 is still at it. `work` itself
    must use no collectives.
    """
    outcome: dict[str, Any] = {}
    with _still_at_it(world):
        if world.is_main:
            try:
                outcome["value"] = work()
            except (UserError, OSError) as error:
                outcome["error"] = str(error)
    outcome = broadcast_json(world, outcome)
    if "error" in outcome:
        raise UserError(outcome["error"])
    result: T = outcome["value"]
    return result


class PackedSum:
    """One asynchronous float64 sum over the ranks per step, collected one step later.

    `launch` starts the sum of a vector; `collect` waits for it and returns it with the first `head` entries as
    Python floats. On CUDA the head is copied to the host behind the collective on a stream of its own, so that
    reading it waits for the collective alone and not for the step that was launched after it.
    """

    def __init__(self, head: int, device: torch.device) -> None:
        self._head = head
        self._device = device
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pending: tuple[Any, torch.Tensor, torch.Tensor, Any] | None = None

    @property
    def is_pending(self) -> bool:
        return self._pending is not None

    def launch(self, vector: torch.Tensor) -> None:
        """Start the sum of `vector` (float64, 1-d, consumed) over all ranks."""
        assert self._pending is None, "collect the last sum first"
        work = dist.all_reduce(vector, async_op=True)
        head, event = vector[: self._head], None
        if self._side is None:
            # gloo's threads need the cores that compute: beside a forward the same sum took 1.5 ms instead of 0.4.
            work.wait()
        else:
            with torch.cuda.stream(self._side):
                work.wait()
                head = head.to("cpu", non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
        self._pending = (work, vector, head, event)

    def collect(self) -> tuple[list[float], torch.Tensor]:
        """The head as floats, and the whole sum (float64, on the device)."""
        assert self._pending is not None, "nothing was launched"
        work, vector, head, event = self._pending
        self._pending = None
        work.wait()
        if event is not None:
            event.synchronize()
        return [float(x) for x in head], vector


class StopRequest:
    """Whether somebody asked this process to stop: SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 set a flag, nothing else.

    Install it after `init`: a flag cannot interrupt a rendezvous that waits for ranks that will never come.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        if threading.current_thread() is threading.main_thread():
            for name in STOP_SIGNALS:
                signal.signal(signal.Signals[name], self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number).name
