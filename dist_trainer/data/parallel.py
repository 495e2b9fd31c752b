"""Work over many shards in parallel: processes that end with this one, and their progress."""

import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, resource_tracker
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_trainer.distributed.processes import STOP_SIGNALS, die_with_parent
from dist_trainer.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_LONG = 60  # seconds; after that a log gets a line with the time left


def in_processes(work: Callable[[T], R], items: Sequence[T], processes: int) -> Generator[tuple[int, R], None, None]:
    """(number of the item, `work(item)`) in the order of completion; in this process if one is enough.

    Raises what `work` raises, and UserError when a process is killed. Close the generator if you leave it early.
    """
    futures: dict[Future[R], int] = {}
    if processes <= 1 or len(items) <= 1:
        yield from ((number, work(item)) for number, item in enumerate(items))
        return
    start_resource_tracker()
    others = set(active_children())
    pool = ProcessPoolExecutor(min(processes, len(items)), mp_context=get_context("spawn"), initializer=as_worker)
    try:
        futures = {pool.submit(work, item): number for number, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise UserError("a process was killed, perhaps for lack of memory; try fewer --processes") from None
    finally:
        if futures:  # do not wait for unfinished work
            for process in set(active_children()) - others:
                process.kill()
        pool.shutdown(cancel_futures=True)


def as_worker(number: int = 0) -> None:
    """Set up a worker: it ends with its parent, and ignores signals, since Slurm and Ctrl-C signal every process of a
    job."""
    die_with_parent(signal.SIGKILL)
    for name in STOP_SIGNALS:
        signal.signal(signal.Signals[name], signal.SIG_IGN)


def loader_fault(error: BaseException) -> str | None:
    """One line with the remedy if `error` says that a loader process died or could not hand over its images, else None.

    torch has no types for these errors, so its words decide (torch 2.14, utils/data/dataloader.py and _utils/).
    """
    text = str(error)
    killed = "a loader process was killed, most likely for want of memory: set fewer data.workers, or 0"
    if isinstance(error, EOFError | ConnectionError) and any(
        "multiprocessing" in frame.filename for frame in traceback.extract_tb(error.__traceback__)
    ):
        return killed  # while it handed over a batch
    if "DataLoader" not in text and "Too many open files" not in text and "ancdata" not in text:
        return None
    if "Too many open files" in text or "ancdata" in text:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"ulimit -n is {limit}, too few open files for loader processes: raise it, or set data.workers: 0"
    if re.search(r"Bus error|shared memory|shm", text):
        return (
            "/dev/shm is full, where loader processes hand over their images: enlarge it (docker --shm-size 8g), lower "
            "batch.micro_batch, or set data.workers: 0"
        )
    if "killed by signal" in text or "exited unexpectedly" in text:  # whichever of two places notices it first
        return killed
    return None


def silence_loaders() -> None:
    """At the end of a program, after an error: torch has no more to say of loader processes.

    Its handler would raise a death in whatever this thread does at the time; a loader that was never whole complains
    when it is collected.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    others = sys.unraisablehook
    sys.unraisablehook = lambda found: None if "DataLoaderIter" in str(found.object) else others(found)


def start_resource_tracker() -> None:
    """Start multiprocessing's helper so that it survives SIGUSR1 and SIGHUP, as it does SIGTERM and SIGINT.

    Slurm signals every process of a job; without its helper, each semaphore ends in a traceback. After an error it
    removes what is left without a word: nobody can do anything about it.
    """
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGUSR1, signal.SIGHUP)}
        sys.warnoptions.append("ignore:resource_tracker")  # the helper inherits it
        resource_tracker.ensure_running()
        sys.warnoptions.remove("ignore:resource_tracker")
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def progress(title: str, total: int, *, in_bytes: bool, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; in a log, lines with the time left. Yields a function that counts finished work.

    The first line comes after a second, then at growing intervals, none when the work is nearly done.
    """
    console = Console(stderr=True)
    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn(title), BarColumn(), amount, TimeRemainingColumn())
    began, done, due = time.monotonic(), 0, 1.0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def advance(amount: int) -> None:
            nonlocal done, due
            bar.advance(task, amount)
            done += amount
            passed = time.monotonic() - began
            left = passed * (total - done) / max(done, 1)
            if not console.is_terminal and passed > due and left > _LONG:
                due = max(2 * passed, passed + _LONG)
                say(f"{title}: {done / total:.1%} after {passed:.0f} s, about {left / 60:.0f} min to go")

        yield advance
