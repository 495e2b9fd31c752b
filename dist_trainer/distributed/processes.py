"""This process and its children: signals, ending together. No torch here, so that workers start fast."""

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from dist_trainer.errors import EXIT_STATUS, first_line

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
STATUS_FILE = "DIST_TRAINER_STATUS"
"""The variable that names the file into which ranks write how they ended."""
ATTEMPT = "DIST_TRAINER_ATTEMPT"
"""The variable in which a launcher names its attempt at a run, such as JOB.RESTARTS; STATE repeats it."""
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "barrier")
"""Those that this package calls, by torch's names."""
SECOND_AFTER_S = 2.0
"""A signal this long after the first is a second one: torchrun and Slurm each deliver the first, in milliseconds."""


def launched_by_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    return "TORCHELASTIC_RUN_ID" in environ


def status_of_rank(status: int, *, alone: bool = False) -> int:
    """The exit status for this process, given that of its command. `alone`: other ranks do not end for this reason.

    torchrun starts a rank again that ends with another one than 0, and ends the others. So an orderly stop is 0; and
    where commands/agent.py named a file for the true status, so is whatever all ranks end with.
    """
    if not launched_by_torchrun():
        return status
    if file := os.environ.get(STATUS_FILE):
        with Path(file).open("a") as out:
            out.write(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {status}\n")
        return status if alone or status == EXIT_STATUS["fault"] else 0
    return 0 if status == EXIT_STATUS["stopped"] else status


def lost_contact(error: Exception) -> str | None:
    """One line if `error` says that another rank is gone. What ended that one is the cause, and is said there."""
    words = r"[Cc]onnection (closed|reset|refused)|Broken pipe|gloo|ncclRemoteError|NCCL.*before timing out"
    if not isinstance(error, RuntimeError) or not re.search(words, str(error), re.DOTALL):
        return None
    return f"lost contact with another rank, which failed or was ended{_during(error)}: {_reason(error)}"


def nccl_fault(error: Exception) -> str | None:
    """One line if `error` is a failure of NCCL on this rank: the collective, and NCCL's reason."""
    if not isinstance(error, RuntimeError) or "NCCL" not in str(error):
        return None
    shared = "Duplicate GPU" in str(error)
    advice = "; each rank needs a GPU of its own: start fewer per host, or srun --gpus-per-task=1" if shared else ""
    return f"NCCL failed{_during(error)}: {_reason(error)}{advice}"


def _during(error: Exception) -> str:
    """` in ALLREDUCE`: the collective, if the text or the stack names it."""
    if named := re.search(r"OpType=_?(\w+)", str(error)):
        return f" in {named[1]}"
    calls = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    known = [name for name in calls if name in COLLECTIVES]
    return f" in {known[-1]}" if known else ""


def _reason(error: Exception) -> str:
    """NCCL's texts begin with a place in its source, and the reason comes below, the peer's address last; gloo's begin
    with one too, and end with advice."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = next((line for line in lines if re.match(r"nccl\w*Error|ncclInvalid", line)), None)
    if named is None:
        return re.sub(r"^\[/\S+\] |\. This is typically caused by.*", "", first_line(error))
    last = lines[lines.index("Last error:") + 1 :][:1] if "Last error:" in lines else []
    return " ".join([named, *last])


def die_with_parent(signum: int) -> None:
    """Let the kernel send `signum` to this process when its parent dies, so that a SIGKILL leaves no orphan (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died while this process started: no signal comes
        os.kill(os.getpid(), signum)


def die_with_torchrun() -> None:
    """End with torchrun, however it ends: it ends its ranks with SIGTERM; if it is killed, the kernel sends that. If it
    was killed while Python started here, this process ends at once.

    Call it before what takes long, such as torch's import: until then no signal would come, and the rendezvous would
    wait for minutes.
    """
    parent = os.getppid()
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent or (parent == 1 and not _store_answers()):
        os.kill(os.getpid(), signal.SIGTERM)


def _store_answers() -> bool:
    """Whether somebody listens where torchrun has its store. In a container torchrun itself may be process 1."""
    address = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", 0))
    try:
        socket.create_connection(address, timeout=10).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True  # a network that is slow to come
    return True


class StopRequest:
    """Whether this process was asked to stop. SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP only set a flag.

    Create it after `init_world`: a flag cannot interrupt a rendezvous that waits for missing ranks.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.heard: tuple[str, float] | None = None
        """(the first signal, time.monotonic() when it came), also while this process waits inside a library."""
        if threading.current_thread() is threading.main_thread():
            for name in STOP_SIGNALS:
                if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means it
                    signal.signal(signal.Signals[name], self._remember)

    def end_at_second(self, end: Callable[[], None]) -> None:
        """From now on a second signal calls `end`, on a thread: also while this process waits inside a library."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._wait_for_second, args=(reader, end), daemon=True, name="second signal").start()

    def _wait_for_second(self, reader: int, end: Callable[[], None]) -> None:
        numbers = {signal.Signals[name].value for name in STOP_SIGNALS}
        while number := os.read(reader, 1):
            if number[0] not in numbers:
                continue
            if self.heard is None:
                self.heard = signal.Signals(number[0]).name, time.monotonic()
            elif time.monotonic() - self.heard[1] >= SECOND_AFTER_S:
                end()

    def _remember(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number).name
