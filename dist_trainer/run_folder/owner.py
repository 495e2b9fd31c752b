"""Ownership of a run folder: owner.json with a heartbeat, so that a second live trainer is refused."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from dist_trainer.errors import UserError
from dist_trainer.storage.atomic import replace_text

_HEARTBEAT_S = 10.0
_STALE_S = 60.0


def _process_start(pid: int) -> str | None:
    """When process `pid` of this host started, in clock ticks, or None when it does not run (Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Ownership:
    """This process's claim to the run folder `path`, from `claim` until `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._released = threading.Event()

    def claim(self) -> None:
        """Become the folder's owner. Raises UserError while another live trainer is."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / ".lock").open("w") as lock:
                with contextlib.suppress(OSError):  # a file system without locks: the check below must do
                    fcntl.flock(lock, fcntl.LOCK_EX)
                owner = self._read_owner()
                if owner and self._is_live(owner):
                    raise UserError(
                        f"{self.path}: process {owner['pid']} on {owner['host']} is training there"
                        f"{' (job ' + owner['job'] + ')' if owner.get('job') else ''}; "
                        "wait for it, stop it, or choose another --run.name"
                    )
                self._beat()
        except OSError as error:
            raise UserError(f"run.dir: cannot write {self.path}: {error.strerror or error}") from None
        threading.Thread(target=self._beat_on, daemon=True, name="run folder heartbeat").start()

    def _read_owner(self) -> dict[str, Any] | None:
        try:
            owner: dict[str, Any] = json.loads((self.path / "owner.json").read_text())
            return owner
        except (OSError, ValueError):
            return None

    def _is_live(self, owner: dict[str, Any]) -> bool:
        if owner.get("host") == socket.gethostname():
            return _process_start(int(owner["pid"])) == owner.get("started")
        return bool(time.time() - float(owner.get("heartbeat", 0)) < _STALE_S)

    def _beat(self) -> None:
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "heartbeat": time.time(),
        }
        replace_text(self.path / "owner.json", json.dumps(owner), shared=True)

    def _beat_on(self) -> None:
        while not self._released.wait(_HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a full disk must not end the thread; the next beat may succeed
                self._beat()

    def release(self) -> None:
        self._released.set()
        (self.path / "owner.json").unlink(missing_ok=True)
