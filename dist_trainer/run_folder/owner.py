"""Ownership of a run folder: owner.json with a heartbeat, so that a second live trainer is refused."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_trainer.distributed.processes import ATTEMPT
from dist_trainer.errors import LocalError, UserError
from dist_trainer.storage.atomic import replace_text

HEARTBEAT_S = 10.0
STALE_S = 60.0
"""An owner elsewhere that has not written for so long is gone."""


def _process_start(pid: int) -> str | None:
    """When process `pid` of this host started, in clock ticks, or None when it does not run (Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _process_table() -> str | None:
    """What tells this host's process numbers from those of other hosts and containers, whatever their names (Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def describe_self(token: str) -> dict[str, Any]:
    """What owner.json says of this process."""
    return {
        "host": socket.gethostname(),
        "processes": _process_table(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "attempt": os.environ.get(ATTEMPT),
        "token": token,
        "heartbeat": time.time(),
    }


def is_self(owner: dict[str, Any]) -> bool:
    """Whether this very process was the owner, as before a roll-back."""
    own = describe_self("")
    return all(owner.get(name) == own[name] for name in ("host", "processes", "pid", "started"))


def lives(owner: dict[str, Any]) -> bool | None:
    """Whether an owner is there still, as far as this host can tell; None: only a further heartbeat will."""
    table = owner.get("processes")
    if table == _process_table() if table else owner.get("host") == socket.gethostname():
        return _process_start(int(owner["pid"])) == owner.get("started")
    same_job = bool(owner.get("job")) and owner["job"] == os.environ.get("SLURM_JOB_ID")
    if same_job and owner.get("attempt") != os.environ.get(ATTEMPT):
        return False  # Slurm begins a job's next attempt when it has ended the one before
    return None


class Ownership:
    """This process's claim to the run folder `path`, from `claim` until `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = secrets.token_hex(8)
        """Tells this claim from all others; owner.json has it."""
        self._released = threading.Event()

    def claim(self, say: Callable[[str], None] = print) -> None:
        """Become the folder's owner. Raises UserError while another live trainer is.

        An owner on another host lives if it goes on writing: `say` tells that this takes up to a minute.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / ".lock").open("w") as lock:
                with contextlib.suppress(OSError):  # a file system without locks: the check below must do
                    fcntl.flock(lock, fcntl.LOCK_EX)
                owner = read_owner(self.path)
                if owner and self._is_live(owner, say):
                    raise UserError(
                        f"{self.path}: process {owner['pid']} on {owner['host']} is training there"
                        f"{' (job ' + owner['job'] + ')' if owner.get('job') else ''}; "
                        "wait for it, stop it, or choose another --run.name"
                    )
                self._beat()
        except OSError as error:
            raise UserError(f"run.dir: cannot write {self.path}: {error.strerror or error}") from None
        threading.Thread(target=self._beat_on, daemon=True, name="run folder heartbeat").start()

    def _is_live(self, owner: dict[str, Any], say: Callable[[str], None]) -> bool:
        known = lives(owner)
        return self._goes_on_writing(owner, say) if known is None else known

    def _goes_on_writing(self, owner: dict[str, Any], say: Callable[[str], None]) -> bool:
        """Whether an owner elsewhere does so. Ages are by the clock of the file system, since hosts' may differ."""
        (self.path / ".lock").touch()
        try:
            left = STALE_S - ((self.path / ".lock").stat().st_mtime - (self.path / "owner.json").stat().st_mtime)
        except FileNotFoundError:  # released in this moment
            return False
        if left <= 0:
            return False
        say(
            f"{self.path}: process {owner['pid']} on {owner['host']} was training there "
            f"{max(0.0, STALE_S - left):.0f} s ago; it may live: waiting up to {left:.0f} s for a sign of it"
        )
        if _comes(self.path, lambda: read_owner(self.path) != owner, left):
            return read_owner(self.path) is not None  # it wrote again, or released the folder
        say(f"{self.path}: no sign of it: going on in its place")
        return False

    def _beat(self) -> None:
        replace_text(self.path / "owner.json", json.dumps(describe_self(self.token)), shared=True)

    def _beat_on(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a full disk must not end the thread; the next beat may succeed
                if self._is_ours():
                    self._beat()

    def _is_ours(self) -> bool:
        owner = read_owner(self.path)
        return owner is None or owner.get("token") == self.token

    def check(self) -> None:
        """Raises LocalError if another trainer has taken the folder: this one had been out of reach for too long."""
        if not self._is_ours():
            raise LocalError(f"{self.path}: another trainer has taken it over in the meantime; this one ends")

    def release(self) -> None:
        self._released.set()
        if self._is_ours():
            (self.path / "owner.json").unlink(missing_ok=True)


def is_owned(path: Path) -> bool:
    """Whether a trainer seems to live in the run folder `path`. For people who look: nothing waits or is written."""
    owner = read_owner(path)
    if owner is None:
        return False
    if owner.get("processes") is not None and owner["processes"] == _process_table():
        return _process_start(int(owner["pid"])) == owner.get("started")
    return time.time() - float(owner.get("heartbeat", 0)) < STALE_S


def sees_owner(path: Path, token: str, patience_s: float = 10.0) -> bool:
    """Whether the run folder `path`, as this host sees it, is the one that was claimed with `token`.

    Network file systems show another host's file with a delay.
    """
    return _comes(path, lambda: (read_owner(path) or {}).get("token") == token, patience_s)


def sees_file(file: Path, patience_s: float = 10.0) -> bool:
    """Whether this host sees a file that another one has just written."""
    return _comes(file.parent, file.exists, patience_s)


def _comes(folder: Path, condition: Callable[[], bool], patience_s: float) -> bool:
    until = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > until:
            return False
        with contextlib.suppress(OSError):
            list(folder.iterdir())  # makes NFS look again
        time.sleep(min(0.2, patience_s))
    return True


def read_owner(path: Path) -> dict[str, Any] | None:
    """What owner.json of the run folder `path` says; None where there is none, or none that parses."""
    try:
        owner: dict[str, Any] = json.loads((path / "owner.json").read_text())
        return owner
    except (OSError, ValueError):
        return None
