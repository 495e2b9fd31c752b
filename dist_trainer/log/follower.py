"""Rank 0's side of the process that shows the record elsewhere (follow.py)."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from dist_trainer.log.follow import NO_ANSWER, Task


class Follower:
    """Started at once, ended by `close`, or by the end of this process."""

    def __init__(self, task: Task, say: Callable[[str], None]) -> None:
        """`say` prints its lines, from another thread."""
        self._say, self._task, self._is_closed = say, task, False
        self._patience = self._until = 0.0
        self._process = self._start(task)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @staticmethod
    def _start(task: Task) -> "subprocess.Popen[str]":
        """In a session of its own: Ctrl-C, or the end of this process group, does not reach it."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dist_trainer.log.follow"],  # imports what this process would, from where
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it ended at once
            process.stdin.write(task.to_json() + "\n")
            process.stdin.flush()
        return process

    def _listen(self) -> None:
        while True:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                message = json.loads(line)
                if "say" in message:
                    self._say(message["say"])
                self._until = max(self._until, time.monotonic() + message.get("busy", 0.0))
            if self._process.wait() != NO_ANSWER or self._task.mode == "offline":
                return
            self._task = replace(self._task, mode="offline")
            self._process = self._start(self._task)
            if self._is_closed:
                self._until = time.monotonic() + self._patience
                self._end_input()

    def _end_input(self) -> None:
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def close(self, patience: float) -> None:
        """The record is complete, STATE and summary.json are written: wait for it to end, `patience` seconds after its
        last sign of work. After that it goes on alone, within limits of its own."""
        self._patience, self._until, self._is_closed = patience, time.monotonic() + patience, True
        self._end_input()
        while self._thread.is_alive() and time.monotonic() < self._until:
            self._thread.join(0.1)
