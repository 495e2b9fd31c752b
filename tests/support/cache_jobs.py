"""What other processes of a node do in the cache's tests. A module of its own: few imports, so they start soon."""

import os
import resource
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faulty_fs  # noqa: F401  # its protocol is needed in each process
import numpy as np

from dist_trainer.data.read import Reader
from dist_trainer.storage import cache

HANG = 180  # seconds: a guard against hanging, no measure of speed


class Job:
    """`work(*args)` in a spawned process."""

    def __init__(self, work: Callable[..., Any], *args: Any) -> None:
        context = get_context("spawn")
        self._answer, answer = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=(answer, work, args))
        self.process.start()
        answer.close()

    def result(self) -> Any:
        """What it returned; raises when it failed or hangs."""
        assert self._answer.poll(HANG), "no answer"
        result = self._answer.recv()
        self.process.join(HANG)
        assert self.process.exitcode == 0
        return result

    @property
    def is_waiting(self) -> bool:
        return self.process.is_alive() and not self._answer.poll(0)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(HANG)


def _run(answer: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    answer.send(work(*args))


def read_in_order_of(reader: Reader, seed: int, batch: int) -> list[Any]:
    """Every sample once, in an order drawn from `seed`; given back in the index's order."""
    order = np.random.default_rng(seed).permutation(len(reader._index))
    found = {}
    for start in range(0, len(order), batch):
        ids = order[start : start + batch]
        found.update(zip(ids.tolist(), reader.read(ids), strict=True))
    return [found[sample] for sample in range(len(order))]


def read(reader: Reader, ids: list[int]) -> list[Any]:
    return reader.read(np.array(ids))


def churn(reader: Reader, seed: int, seconds: float, truth: list[bytes]) -> int:
    """Read random samples for `seconds`; gives how many were wrong."""
    rng = np.random.default_rng(seed)
    until, wrong = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        ids = rng.integers(0, len(truth), 16)
        wrong += sum(data != truth[sample] for sample, data in zip(ids.tolist(), reader.read(ids), strict=True))
    return wrong


def read_without_room(reader: Reader, ids: list[int], most: int) -> list[Any]:
    """As `read`, in a process that may write files of `most` bytes only."""
    cache._PAUSE_WHEN_FULL = 0.0  # so that every block is tried
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return [data for start in range(0, len(ids), 8) for data in read(reader, ids[start : start + 8])]


def hang_in_write(reader: Reader, ids: list[int], flag: str) -> None:
    """As `read`, but the process stops in the middle of writing the first block, and makes the file `flag`."""
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if len(data) < 100:  # the counter
            return real(descriptor, data, offset)
        real(descriptor, memoryview(data)[: len(data) // 2], offset)
        Path(flag).touch()
        time.sleep(2 * HANG)
        raise AssertionError

    os.pwrite = pwrite
    read(reader, ids)


def prefetch_and_end(reader: Reader, blocks: list[int]) -> str:
    """Leave threads behind that hang in a request."""
    reader.prefetch(blocks)
    return "done"
