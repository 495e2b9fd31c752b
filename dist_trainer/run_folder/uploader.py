"""The thread that keeps a run's mirror up to date, and the claim to that mirror."""

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_trainer.errors import LocalError, Outage, UserError
from dist_trainer.run_folder import checkpoint, lineage
from dist_trainer.run_folder.lineage import Begin
from dist_trainer.run_folder.mirror import OWNER, Mirror, Moved
from dist_trainer.run_folder.owner import STALE_S, describe_self, is_self, lives
from dist_trainer.run_folder.retention import Retention
from dist_trainer.storage.storage import RetryConfig

HEARTBEAT_S = 20.0
_REFUSED = (Outage, OSError)
"""What storage raises; training goes on."""
MAX_BEGUN_AGAIN = 10


class Uploader:
    """From `claim` until `finish`. Used on rank 0; every copy is made on a thread, and none stops training."""

    def __init__(self, mirror: Mirror, run: Path) -> None:
        self.mirror = mirror
        self.failed = 0
        """Passes over the run folder that ended at an error of the storage."""
        self._run, self._token = run, secrets.token_hex(8)
        self._quick = mirror.storage.with_retry(RetryConfig(timeout=5, deadline=10))  # a run that ends cannot wait long
        self._retention = Retention()
        self._news: list[str] = []
        self._problem: str | None = None
        self._is_owner, self._taken = False, False
        self._has_joined = False
        """Whether the mirror is known to have nothing that the local folder lacks."""
        self._changed = threading.Condition()
        self._wanted, self._done, self._ends = 0, 0, False
        self._begins: Sequence[Begin] = []

    # The claim

    def claim(self, say: Callable[[str], None]) -> None:
        """Refuse a second live trainer, as well as an object store can (it has no locks), and bring the run back where
        the mirror is ahead of the local folder.

        Raises UserError while another trainer seems to live, where both have parted, and where the mirror cannot be
        reached while there is no run here.
        """
        try:
            self._become_owner(say)
            self._bring_back(say)
            self._has_joined = True
        except _REFUSED as error:
            if not checkpoint.complete(self._run / "checkpoints"):
                raise _unread(error) from None
            say(f"warning: run.mirror: {_line(error)}; going on from {self._run}; copied once it can be reached")
        except BaseException:
            self.release()
            raise

    def has_checkpoints(self) -> bool:
        """Raises UserError for a mirror that cannot be read."""
        try:
            return bool(self.mirror.manifests("checkpoints"))
        except _REFUSED as error:
            raise _unread(error) from None
        except UserError as error:  # a URL that nobody knows
            raise UserError(f"run.mirror: {error}") from None

    def _read_owner(self) -> dict[str, Any] | None:
        try:
            owner: dict[str, Any] = json.loads(self._quick.read(self.mirror.at(OWNER)))
            return owner
        except (FileNotFoundError, ValueError):
            return None

    def _beat(self) -> None:
        self._quick.write(self.mirror.at(OWNER), json.dumps(describe_self(self._token)).encode())

    def _become_owner(self, say: Callable[[str], None]) -> None:
        """An owner elsewhere lives if it goes on writing."""
        owner = self._read_owner()
        if owner is not None and not is_self(owner) and self._is_live(owner, say):
            raise UserError(
                f"{self._where(owner)} is training there; wait for it, stop it, or choose another --run.name"
            )
        self._beat()
        self._is_owner = True

    def _where(self, owner: dict[str, Any]) -> str:
        return f"{self.mirror.location}: process {owner.get('pid')} on {owner.get('host')}"

    def _is_live(self, owner: dict[str, Any], say: Callable[[str], None]) -> bool:
        known = lives(owner)
        left = min(STALE_S, STALE_S - (time.time() - float(owner.get("heartbeat", 0))))
        if known is not None or left <= 0:
            return bool(known)
        say(f"{self._where(owner)} was training there; it may live: waiting up to {left:.0f} s for a sign of it")
        until = time.monotonic() + left
        while time.monotonic() < until:
            time.sleep(1.0)
            if (now := self._read_owner()) != owner:
                return now is not None  # it wrote again, or released the mirror
        return False

    def _bring_back(self, say: Callable[[str], None]) -> None:
        mirror = self.mirror
        theirs, ours = mirror.begins(), lineage.read(self._run)
        steps = mirror.manifests("checkpoints")
        if not theirs and not steps:
            return
        here = checkpoint.complete(self._run / "checkpoints")
        our_step, their_step = checkpoint.step_of(here[0]) if here else 0, max(steps, default=0)
        copy = lineage.ahead(ours, our_step, theirs, their_step) if ours or here else "theirs"
        if copy is None:
            raise UserError(
                f"{self._run} (at step {our_step}) and {mirror.location} (at step {their_step}) have parted: each has "
                "training that the other has not. Nothing was changed: move one away, or take another --run.name"
            )
        if copy == "theirs":
            say(f"{mirror.location} is {'ahead' if here else 'there'}, at step {their_step}: going on from it")
            for note in mirror.bring_back(self._run):
                say(note)

    # While training

    def begin(self, begins: Sequence[Begin]) -> None:
        """Training goes on; these are the starts of the run, with this one."""
        self._begins = begins
        threading.Thread(target=self._copy_on, daemon=True, name="mirror").start()
        threading.Thread(target=self._beat_on, daemon=True, name="mirror heartbeat").start()
        self.request(self._retention)

    def request(self, retention: Retention) -> None:
        """Bring the mirror up to date, soon."""
        with self._changed:
            self._retention = retention
            self._wanted += 1
            self._changed.notify_all()

    def tell(self) -> list[str]:
        """Lines about what happened since the last call."""
        if not self._news:
            return []
        with self._changed:
            news, self._news = self._news, []
        return news

    def check(self) -> None:
        """Raises LocalError if another trainer has taken the mirror."""
        if self._taken:
            raise LocalError(
                f"{self.mirror.location}: another trainer has taken it over in the meantime; this one ends"
            )

    def finish(self, seconds: float) -> str | None:
        """A last pass, waited for as long; a line about what is missing."""
        self.request(self._retention)
        until = time.monotonic() + seconds
        with self._changed:
            while self._done < self._wanted and time.monotonic() < until:
                self._changed.wait(max(0.0, until - time.monotonic()))
            is_done, self._ends = self._done >= self._wanted, True
            self._changed.notify_all()
        if is_done and self._problem is None:
            return None
        why = self._problem or f"no end of it within {seconds:.0f} s"
        return f"run.mirror: {self.mirror.location} is not complete: {why}; start the run again to copy the rest"

    def copy_rest(self) -> str | None:
        """Of a run that is complete here: one pass, now; a line about what is missing."""
        self._begins, self._retention = lineage.read(self._run), Retention(last=10**9)
        problem = self._pass()
        return f"run.mirror: {self.mirror.location} is not complete: {problem}" if problem else None

    def release(self) -> None:
        """The mirror is free for another trainer."""
        with contextlib.suppress(*_REFUSED):  # otherwise it grows stale
            if self._is_owner and (self._read_owner() or {}).get("token") == self._token:
                self._quick.remove(self.mirror.at(OWNER))

    def _copy_on(self) -> None:
        while True:
            with self._changed:
                while self._done >= self._wanted and not self._ends:
                    self._changed.wait()
                if self._ends:
                    return
                wanted = self._wanted
            problem = self._pass()
            with self._changed:
                if problem is not None:
                    self.failed += 1
                    if self._problem is None:
                        self._news.append(f"warning: run.mirror: {problem}; tried again after the next checkpoint")
                elif self._problem is not None:
                    self._news.append(f"run.mirror: {self.mirror.location} is up to date again")
                self._problem, self._done = problem, wanted
                self._changed.notify_all()

    def _pass(self) -> str | None:
        """One pass; what kept it from its end."""
        try:
            if not self._has_joined:  # it could not be reached before
                self._join()
            for _ in range(MAX_BEGUN_AGAIN):
                try:
                    self.mirror.bring_up_to_date(self._run, self._retention)
                    return None
                except Moved:
                    continue
            return "training removes checkpoints faster than they can be copied"
        except Exception as error:  # also a storage package's own: no reason to lose a run
            return _line(error)

    def _join(self) -> None:
        """Begin to copy late. Raises UserError where that would overwrite what another start has copied."""
        theirs = self.mirror.begins()
        if lineage.common(self._begins, theirs) < len(theirs):
            raise UserError(f"{self.mirror.location} has parted from {self._run}; nothing is copied there")
        if not self._is_owner:
            self._become_owner(lambda line: None)
        self._has_joined = True

    def _beat_on(self) -> None:
        while not self._ends:
            with self._changed:
                self._changed.wait_for(lambda: self._ends, HEARTBEAT_S)
            with contextlib.suppress(*_REFUSED):
                if self._ends or not self._is_owner:
                    continue
                owner = self._read_owner()
                if owner is not None and owner.get("token") != self._token:
                    self._taken = True
                    return
                self._beat()


def _unread(error: Exception) -> UserError:
    return UserError(f"run.mirror: cannot be read, and no checkpoint is here to go on from: {_line(error)}")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError | OSError) and text else f"{type(error).__name__}: {text}"
