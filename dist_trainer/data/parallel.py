"""Work over many shards at once: processes that nothing outlives, and how far they are."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_trainer.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_LONG = 60  # seconds; from there on a log is told how long it will take


def in_processes(work: Callable[[T], R], items: Sequence[T], processes: int) -> Iterator[tuple[int, R]]:
    """(number of the item, `work(item)`), as they get done; in this process where one is enough.

    Raises what `work` raises, and UserError when a process is killed.
    """
    if processes <= 1 or len(items) <= 1:
        yield from ((number, work(item)) for number, item in enumerate(items))
        return
    pool = ProcessPoolExecutor(
        min(processes, len(items)), mp_context=get_context("spawn"), initializer=_end_with_parent
    )
    try:
        futures = {pool.submit(work, item): number for number, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise UserError("a process was killed, perhaps for want of memory; try fewer --processes") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """Signals are the parent's business, and nothing outlives it."""
    from dist_trainer.comm import STOP_SIGNALS, die_with_parent

    die_with_parent(signal.SIGKILL)
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextmanager
def progress(title: str, total: int, *, in_bytes: bool, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; in a log, one line that says how long it will take. Gives what counts the work done."""
    console = Console(stderr=True)
    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn(title), BarColumn(), amount, TimeRemainingColumn())
    began, done, said = time.monotonic(), 0, console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def advance(amount: int) -> None:
            nonlocal done, said
            bar.advance(task, amount)
            done += amount
            passed = time.monotonic() - began
            left = passed * (total - done) / max(done, 1)
            if not said and passed > 1 and left > _LONG:
                said = True
                say(f"{title}: {done / total:.1%} after {passed:.0f} s, about {left / 60:.0f} min to go")

        yield advance
