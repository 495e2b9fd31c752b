"""A rank that hangs reports where, and ends. Nothing else would tell which of a thousand ranks it was.

Code that makes progress calls `beat`: streams at every batch, and long work on rank 0.

A rank that waits for its device, which waits for a rank that is gone, hears no signal: it only sets a flag. So a stop
that no progress follows ends the rank hard, before torchrun and Slurm, which wait 30 s, would kill it without a word.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dist_trainer.distributed.processes import status_of_rank
from dist_trainer.errors import EXIT_STATUS

STOP_S = 20.0
"""How long a rank that was asked to stop may go without progress, or twice as long as it took last, if that is more."""
_beats = threading.Event()


def beat() -> None:
    """Report progress."""
    _beats.set()


@contextlib.contextmanager
def watched(
    timeout_s: float,
    rank: int,
    where: Callable[[], str],
    folder: Path,
    record: Callable[[str], None],
    asked: Callable[[], tuple[str, float] | None] = lambda: None,
) -> Iterator[None]:
    """End this process if there is no `beat` for `timeout_s` in this block, or for STOP_S after it was asked to stop.
    Before that, write the stacks of its threads to `folder`/rank-R.txt.

    `where()` describes the current activity; `record` is called with a line that says so. `asked()`: (signal,
    time.monotonic() when it came), until all ranks know of it and save, which may take longer.
    """
    through = threading.Event()

    def run() -> None:
        last, took = time.monotonic(), 0.0
        while not through.wait(min(1.0, timeout_s / 8)):
            now, stop = time.monotonic(), asked()
            if _beats.is_set():
                _beats.clear()
                last, took = now, now - last
            patience = max(STOP_S, 2 * took)
            if now - last > timeout_s:
                why = f"no progress for {timeout_s:g} s (run.timeout); ended"
            elif stop is not None and now - max(last, stop[1]) > patience:
                why = (
                    f"{stop[0]}, and no progress for {patience:.0f} s, as when another rank is gone: ended; the last "
                    "checkpoint is whole"
                )
            else:
                continue
            line = f"[rank {rank}] {where()}: {why}"
            _report_hang(line, rank, folder)
            record(line)
            os._exit(status_of_rank(EXIT_STATUS["fault"], alone=True))

    thread = threading.Thread(target=run, daemon=True, name="watchdog")
    thread.start()
    try:
        yield
    finally:
        through.set()
        thread.join()  # what it asks may keep a whole run in memory


def _report_hang(line: str, rank: int, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank}.txt"
        with path.open("w") as file:
            file.write(f"{line}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        print(f"{line}; the stacks of its threads: {path}", file=sys.stderr, flush=True)
    except OSError:
        print(line, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
