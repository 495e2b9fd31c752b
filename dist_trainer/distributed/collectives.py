"""Collectives outside the engine: JSON, tensors, work on rank 0, packed sums."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_trainer.distributed.watchdog import beat
from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.tensors import HostCopy

T = TypeVar("T")
MESSAGE_BYTES = 2**26
"""Of tensors that are sent together."""


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
    """Copy rank 0's values into every rank's `tensors` (in place; equal types, shapes and order), through the host.

    Many small ones go in one message.
    """
    if world.size == 1:
        return
    message, size = list[torch.Tensor](), 0
    for tensor in tensors:
        if message and size + tensor.nbytes > MESSAGE_BYTES:
            _broadcast_together(world, message)
            message, size = [], 0
        message.append(tensor.detach())
        size += tensor.nbytes
    if message:
        _broadcast_together(world, message)


def _broadcast_together(world: World, tensors: list[torch.Tensor]) -> None:
    sizes = [tensor.nbytes for tensor in tensors]
    if world.is_main:
        values = torch.cat([tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])
    else:
        values = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(values, 0, group=world.host_group)
    for tensor, piece in zip(tensors, torch.split(values, sizes), strict=True):
        tensor.copy_(piece.clone().view(tensor.dtype).reshape(tensor.shape))  # cloned, so that it is aligned


@contextlib.contextmanager
def _keep_alive(world: World) -> Iterator[None]:
    """Rank 0 runs the block and sends a sign of life now and then; the others wait here until it has finished."""
    if not world.is_main:
        yield
        is_running = torch.ones(1)
        while is_running:
            dist.broadcast(is_running, 0, group=world.host_group)
            beat()
        return
    finished = threading.Event()

    def send(is_running: float) -> None:
        beat()
        if world.size > 1:
            dist.broadcast(torch.tensor([is_running]), 0, group=world.host_group)

    def send_while_running() -> None:
        while not finished.wait(world.beat_s):
            send(1.0)

    thread = threading.Thread(target=send_while_running, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
    send(0.0)


def on_main(world: World, work: Callable[[], T]) -> T:
    """Run `work` on rank 0. Every rank gets its result (JSON can hold it), or raises its UserError.

    `work` may take longer than the timeout of a collective: a thread keeps the others waiting. It must use no
    collectives itself. Its OSErrors become UserErrors.
    """
    outcome: dict[str, Any] = {}
    with _keep_alive(world):
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


def read_on_main(world: World, read: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Named tensors that rank 0 reads, on every rank, on the host (collective). Errors are as those of `on_main`.

    A thousand ranks that read one file would wait for each other, and for its storage.
    """
    found: dict[str, torch.Tensor] = {}

    def work() -> dict[str, list[Any]]:
        found.update(read())
        return {name: [str(each.dtype).removeprefix("torch."), *each.shape] for name, each in found.items()}

    for name, (kind, *shape) in on_main(world, work).items():
        if not world.is_main:
            found[name] = torch.empty(shape, dtype=getattr(torch, kind))
    broadcast_tensors(world, found.values())
    return found


def differing_ranks(values: torch.Tensor) -> tuple[list[int], int] | None:
    """(ranks whose int64 [n] is not that of most others, the first place where they differ), or None (collective)."""
    if dist.get_world_size() == 1:
        return None
    ranks = values.new_empty(dist.get_world_size(), len(values))
    dist.all_gather(list(ranks.unbind()), values)
    usual = ranks.mode(dim=0).values
    if not bool((differ := ranks != usual).any()):
        return None
    first = int(differ.any(0).nonzero()[0])
    return [int(rank) for rank in differ.any(1).nonzero()], first


class PackedSum:
    """One asynchronous float64 sum over the ranks per step, collected one step later.

    `launch` starts the sum of a vector; `collect` waits for it and returns it with the first `head` entries as Python
    floats. On CUDA the head is copied to the host on a side stream after the collective, so reading it waits for the
    collective and not for the step that was launched after it.
    """

    def __init__(self, head: int, device: torch.device) -> None:
        self._head = head
        self._device = device
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pending: tuple[Any, torch.Tensor, HostCopy] | None = None

    @property
    def is_pending(self) -> bool:
        return self._pending is not None

    def launch(self, vector: torch.Tensor) -> None:
        """Start the sum of `vector` (float64, 1-d, consumed) over all ranks."""
        assert self._pending is None, "collect the last sum first"
        work = dist.all_reduce(vector, async_op=True)
        with contextlib.nullcontext() if self._side is None else torch.cuda.stream(self._side):
            # gloo's threads compete with the forward for cores: overlapped, the same sum took 1.5 ms instead of 0.4.
            work.wait()
            head = HostCopy(vector[: self._head])
        self._pending = work, vector, head

    def collect(self) -> tuple[list[float], torch.Tensor]:
        """The head as floats, and the whole sum (float64, on the device)."""
        assert self._pending is not None, "nothing was launched"
        work, vector, head = self._pending
        self._pending = None
        work.wait()
        return head.read().tolist(), vector
