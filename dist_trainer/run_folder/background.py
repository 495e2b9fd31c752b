"""Files written behind training: what is handed over is copied to host memory at once, the rest happens on a thread."""

import contextlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_trainer.errors import LocalError, UserError, plural, readable_size
from dist_trainer.tensors import State

LOOK_S = 0.2
"""How often a wait looks whether a signal has come meanwhile."""
SAID_AFTER_S = 1.0
"""A wait this long for the write before is told."""


@dataclass(frozen=True)
class _Write:
    kind: str
    step: int
    tensors: dict[str, State]
    write: Callable[[dict[str, State]], str | None]


class HostCopies:
    """Copies of tensors in host memory, which the next copy of the same kind uses again. Pinned for those of a GPU."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, State]] = {}

    def take(self, kind: str, tensors: dict[str, State]) -> dict[str, State]:
        """Copies laid out as `tensors` are, which is fastest; complete when this returns."""
        before = self._kept.get(kind, {})
        copies: dict[str, State] = {}
        self._kept[kind] = copies
        devices = set[torch.device]()
        for name, state in tensors.items():
            former = before.get(name, {})
            copies[name] = {}
            for key, value in state.items():
                buffer, on_gpu = former.get(key), value.device.type != "cpu"
                if buffer is None or _layout(buffer) != _layout(value):
                    buffer = torch.empty_like(value, device="cpu", pin_memory=on_gpu, requires_grad=False)
                copies[name][key] = buffer.copy_(value.detach(), non_blocking=on_gpu)
                devices |= {value.device} if on_gpu else set()
        for device in devices:
            torch.accelerator.current_stream(device).synchronize()
        return copies


def _layout(value: torch.Tensor) -> tuple[object, ...]:
    return value.shape, value.stride(), value.dtype


class BackgroundWriter:
    """Writes one thing at a time, in the order in which they came. Used on rank 0 alone, by one thread.

    A write that the storage refuses costs nothing but itself: a line tells of it, and it is tried again with the next
    checkpoint, unless a newer one of its kind took its place. After `max_failed` checkpoints in a row it `gives_up`.
    """

    def __init__(self, root: Path, max_failed: int = 3, *, in_background: bool = True) -> None:
        """`root`: the run folder, whose free bytes are told when a write fails."""
        self._root, self._max_failed, self._in_background = root, max_failed, in_background
        self._copies = HostCopies()
        self._changed = threading.Condition()
        self._waiting: deque[_Write] = deque()
        self._running: _Write | None = None
        self._failed: dict[str, tuple[_Write, str]] = {}
        self._news: list[str] = []
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._ends = False
        self._left_out: str | None = None
        self.until: Callable[[], float | None] = lambda: None
        """Until when (time.monotonic) whoever waits here may wait, looked at again while it waits; None: as long as it
        takes."""
        self.failed_in_a_row = 0
        """Checkpoints that were not written since the last one that was."""
        self.failed = 0
        """Writes that the storage refused, in all."""

    @property
    def gives_up(self) -> str | None:
        """Why training has to stop: `max_failed` checkpoints in a row could not be written."""
        with self._changed:
            if self.failed_in_a_row < self._max_failed:
                return None
            return f"{plural(self.failed_in_a_row, 'checkpoint')} in a row could not be written: {self._first_reason()}"

    def _first_reason(self) -> str:
        return next((reason for _, reason in self._failed.values()), "")

    def submit(
        self,
        kind: str,
        step: int,
        tensors: dict[str, State],
        write: Callable[[dict[str, State]], str | None],
    ) -> bool:
        """Copy `tensors` and have `write` called with the copies; it may return a line to tell. False: a write of the
        same kind still ran at the time `until`; this one is left out, and all after it, which may rely on it.

        Raises what a former write raised, but a refusal of the storage.
        """
        with self._changed:
            if self._left_out or not self._wait(kind):
                self._left_out = self._left_out or f"the {kind} of step {step}"
                return False
            self._failed.pop(kind, None)  # nothing of this kind is written from here on: its memory is free
        new = _Write(kind, step, self._copies.take(kind, tensors), write)
        with self._changed:
            self._waiting.append(new)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="writer")
                self._thread.start()
            self._changed.notify_all()
        if not self._in_background:
            self.wait()
        return True

    def wait(self, kind: str | None = None) -> bool:
        """Until what was handed over (of one kind) is written, or the time is `until` (then False). Raises as `submit`
        does."""
        with self._changed:
            return self._wait(kind)

    def _is_late(self) -> bool:
        until = self.until()
        return until is not None and time.monotonic() >= until

    def is_busy(self, kind: str | None = None) -> bool:
        """Whether something (of one kind) is still to be written."""
        ahead = [*([self._running] if self._running else []), *self._waiting]
        return any(kind in (None, each.kind) for each in ahead)

    def _wait(self, kind: str | None) -> bool:
        began = time.monotonic()
        while self.is_busy(kind) and not self._is_late():
            self._changed.wait(LOOK_S)
        waited = time.monotonic() - began
        if waited > SAID_AFTER_S and kind is not None:
            self._news.append(f"training waited {waited:.1f} s for the {kind} before to be written")
        self._raise()
        return not self.is_busy(kind)

    def tell(self) -> list[str]:
        """Lines about what happened since the last call. Raises as `submit` does."""
        self._raise()
        if not self._news:
            return []
        with self._changed:
            news, self._news = self._news, []
        return news

    def finish(self) -> str | None:
        """Wait for everything, and try again what failed; until the time is `until`. Words about what is missing.

        Nothing can be handed over afterwards.
        """
        try:
            in_time = self.wait()
            with self._changed:
                running = self._running
            if not in_time and running is not None:
                return f"the {running.kind} of step {running.step} could not be written in time"
            for _ in range(self._max_failed):
                if not self._failed or self.gives_up or self._is_late():
                    break
                self._retry_failed()
            with self._changed:
                self._ends = True
                self._changed.notify_all()
            if self._left_out:
                return f"{self._left_out} could not be written in time"
            return self._first_reason() or None
        finally:
            self.until = lambda: None  # it knows the run, which a roll-back replaces

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        # Linux has priorities of threads: where training uses all cores, it comes first.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                while not self._waiting and not self._ends:
                    self._changed.wait()
                if not self._waiting:
                    return
            if self._waiting[0].kind == "checkpoint":
                self._retry_failed()
            with self._changed:
                self._running = self._waiting.popleft()
            self._do(self._running)

    def _retry_failed(self) -> None:
        for kind in list(self._failed):
            with self._changed:
                if kind not in self._failed:  # a newer one took its place
                    continue
                self._running = self._failed[kind][0]
            self._do(self._running)
        with self._changed:
            self._running = None
            self._changed.notify_all()

    def _do(self, each: _Write) -> None:
        line, failed = None, False
        try:
            line = each.write(each.tensors)
        except LocalError as error:  # the folder is another trainer's by now
            self._error = error
        except (UserError, OSError) as error:
            line, failed = f"{error}; {self._room(each)}", True
        except BaseException as error:
            self._error = error
        with self._changed:
            self.failed += failed
            if failed:
                former, self._failed[each.kind] = self._failed.get(each.kind), (each, str(line))
                if former is not None and each.kind != "checkpoint":
                    line = None  # told when it failed first
            else:
                self._failed.pop(each.kind, None)
            if each.kind == "checkpoint":
                self.failed_in_a_row = self.failed_in_a_row + 1 if failed else 0
                if failed:
                    line = f"{line} ({self.failed_in_a_row} of {self._max_failed} in a row)"
            if line:
                self._news.append(line)

    def _room(self, each: _Write) -> str:
        needed = sum(value.nbytes for state in each.tensors.values() for value in state.values())
        try:
            free = readable_size(shutil.disk_usage(self._root).free)
        except OSError as error:
            free = f"an unknown number ({error.strerror})"
        return f"{readable_size(needed)} are needed there, and {free} are free"
