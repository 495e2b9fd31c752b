"""Files that one process at a time writes. They are locked by flock, which the kernel releases if the process dies."""

import fcntl
import os
import time
from pathlib import Path


def lock_file(path: Path, patience: float) -> int | None:
    """A descriptor of `path`, made where it is missing, under flock; None when others hold it for `patience` seconds.

    The lock of a file that was renamed or removed in between is worthless; then the new file is tried.
    """
    until, pause = time.monotonic() + patience, 0.001
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        while not try_flock(descriptor):
            if time.monotonic() > until:
                os.close(descriptor)
                return None
            time.sleep(pause)
            pause = min(1.5 * pause, 0.02)
        if is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def remove_left(path: Path) -> bool:
    """Remove a `.part` that no living process holds."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        if not try_flock(descriptor):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)
