"""A rank that hangs says where it stands, and ends: nothing else would tell which of a thousand ranks it was.

Whatever makes progress calls `beat`: every batch that a stream hands out, and rank 0's long work.
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
    """There was progress."""
    _beats.set()


@contextlib.contextmanager
def watched(timeout_s: float, rank: int, where: Callable[[], str], folder: Path) -> Iterator[None]:
    """End this process when nothing beats for `timeout_s` in this block, its stacks written to `folder`/rank-R.txt.

    `where()` says what it was at.
    """
    through = threading.Event()

    def run() -> None:
        while not through.wait(min(1.0, timeout_s / 8)):
            _beats.clear()
            if not _beats.wait(timeout_s) and not through.is_set():
                _report_hang(timeout_s, rank, where(), folder)
                os._exit(1)

    threading.Thread(target=run, daemon=True, name="watchdog").start()
    try:
        yield
    finally:
        through.set()


def _report_hang(timeout_s: float, rank: int, where: str, folder: Path) -> None:
    line = f"[rank {rank}] {where}: no progress for {timeout_s:g} s (run.timeout); ended"
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
