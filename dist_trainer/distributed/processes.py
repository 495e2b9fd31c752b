"""This process and its children: cores, signals, and an end that is shared. Without torch: workers start at once."""

import contextlib
import ctypes
import os
import signal
import threading

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


def cores() -> int:
    """The cores that this process may use, which under Slurm or a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent(signum: int) -> None:
    """Let the kernel send `signum` to this process when its parent dies, so that a SIGKILL leaves no orphan (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)


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
