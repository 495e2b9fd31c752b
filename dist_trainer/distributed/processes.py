"""This process and its children: cores, signals, ending together. No torch here, so that workers start fast."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


def cores() -> int:
    """The number of cores that this process may use. Under Slurm or in a container it is less than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent(signum: int) -> None:
    """Let the kernel send `signum` to this process when its parent dies, so that a SIGKILL leaves no orphan (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died while this process started: no signal comes
        os.kill(os.getpid(), signum)


class StopRequest:
    """Whether this process was asked to stop. SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 only set a flag.

    Create it after `init_world`: a flag cannot interrupt a rendezvous that waits for missing ranks.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        if threading.current_thread() is threading.main_thread():
            for name in STOP_SIGNALS:
                signal.signal(signal.Signals[name], self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number).name
