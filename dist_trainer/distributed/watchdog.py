"""A rank that hangs reports where, and ends. Nothing else would tell which of a thousand ranks it was.

Code that makes progress calls `beat`: streams at every batch, and long work on rank 0.
"""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_beats = threading.Event()


def beat() -> None:
    """Report progress."""
    _beats.set()


@contextlib.contextmanager
def watched(
    timeout_s: float, rank: int, where: Callable[[], str], folder: Path, record: Callable[[str], None]
) -> Iterator[None]:
    """End this process if there is no `beat` for `timeout_s` in this block, after writing the stacks of its threads to
    `folder`/rank-R.txt.

    `where()` describes the current activity; `record` is called with a line that says so.
    """
    through = threading.Event()

    def run() -> None:
        while not through.wait(min(1.0, timeout_s / 8)):
            _beats.clear()
            if not _beats.wait(timeout_s) and not through.is_set():
                line = f"[rank {rank}] {where()}: no progress for {timeout_s:g} s (run.timeout); ended"
                _report_hang(line, rank, folder)
                record(line)
                os._exit(1)

    threading.Thread(target=run, daemon=True, name="watchdog").start()
    try:
        yield
    finally:
        through.set()


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
