"""Retries of storage requests: attempts with a timeout, random pauses, one deadline.

Attempts that cannot be cancelled run in daemon threads: an executor's threads are joined when the process ends, so one
hanging socket would keep a trainer alive for ever.
"""

import errno
import itertools
import random
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from dist_trainer.errors import Outage, Seconds, UserError

T = TypeVar("T")
R = TypeVar("R")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 20.0  # seconds
_SAY_AFTER = 10.0  # seconds; then a process prints, once, what it is waiting for
_SAID = threading.Semaphore(1)
_DICE = random.SystemRandom()  # ranks that failed together must not retry together; and no random state is touched
_PASSING_LOCAL = {
    getattr(errno, name)
    for name in ("ESTALE", "EIO", "EINTR", "ETIMEDOUT", "EAGAIN", "EREMOTEIO", "ESHUTDOWN", "ENOTCONN", "EHOSTDOWN")
    if hasattr(errno, name)
}
_PASSING_STATUS = {400, 408, 409, 423, 425, 429}  # S3 says 400 for a slow request, aiohttp for a broken answer
_NO_LOGIN = re.compile("Credential|Profile|Token")  # names of botocore's and Google's errors
_MISTAKES = (UserError, ImportError, TypeError, AttributeError, NotImplementedError)


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """How long failed requests to storage are repeated."""

    timeout: Seconds = 30.0
    """Seconds for one attempt; then the next one begins."""
    deadline: Seconds = 300.0
    """Seconds for one read with all its attempts; below run.timeout, after which a rank that waits counts as hung."""

    def check(self, key: str) -> None:
        """Raises UserError, naming `key`, for impossible times."""
        if not 0 < self.timeout <= self.deadline:
            raise UserError(
                f"{key}: timeout {self.timeout:g} s, deadline {self.deadline:g} s; they must be 0 < timeout <= deadline"
            )


class ShortRead(OSError):
    """Fewer bytes came than were asked for."""


def in_background(work: Callable[[], T]) -> "Future[T]":
    """Start `work` in a daemon thread of its own."""
    future: Future[T] = Future()
    threading.Thread(target=_settle, args=(future, work), daemon=True, name="storage").start()
    return future


def concurrently(work: Callable[[T], R], items: Sequence[T], limit: int) -> list[R]:
    """`work(item)` of every item, at most `limit` at a time. Raises the first item's error and starts no more then."""
    if len(items) == 1:
        return [work(items[0])]
    todo: deque[tuple[T, Future[R]]] = deque((item, Future()) for item in items)
    futures = [future for _, future in todo]

    def run() -> None:
        while todo:
            try:
                item, future = todo.popleft()
            except IndexError:  # another thread took the last one
                return
            _settle(future, lambda item=item: work(item))  # type: ignore[misc]
            if future.exception():
                todo.clear()  # here, since the results may be read late. All before this item have begun

    for _ in range(min(limit, len(items))):
        threading.Thread(target=run, daemon=True, name="storage").start()
    try:
        return [future.result() for future in futures]
    finally:
        todo.clear()


def _settle(future: "Future[T]", work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def retrying(
    location: str,
    attempt: Callable[[float], T],
    config: RetryConfig,
    lasting: Callable[[Exception], Exception | None],
    on_retry: Callable[[], None],
) -> T:
    """`attempt(seconds it may take)` until one succeeds, with exponential back-off and full jitter.

    `lasting(error)` is the error to raise if a retry cannot help. Raises Outage when the deadline has passed.
    """
    began = time.monotonic()
    for failed in itertools.count():
        left = config.deadline - (time.monotonic() - began)
        try:
            return attempt(min(config.timeout, left))
        except Exception as error:  # each storage package raises its own
            if isinstance(error, _MISTAKES):
                raise
            final = lasting(error)
            if final is not None:
                raise final from None
            pause = _DICE.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**failed))
            spent = time.monotonic() - began
            if spent + pause >= config.deadline:
                raise Outage(
                    f"{location}: {said(error)}; gave up after {failed + 1} attempts in {spent:.0f} s: "
                    "check the storage or the network, then start again"
                ) from None
            if spent > _SAY_AFTER and _SAID.acquire(blocking=False):
                print(
                    f"{location}: {said(error)}; retrying for up to {config.deadline:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            on_retry()
            time.sleep(pause)
    raise AssertionError


def said(error: BaseException) -> str:
    """An error's message in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def lasting_local(error: Exception) -> Exception | None:
    """A local error that will not pass: all but those of a lost server."""
    return None if isinstance(error, OSError) and error.errno in _PASSING_LOCAL else error


def lasting_remote(location: str) -> Callable[[Exception], Exception | None]:
    """For errors of fsspec's file systems that will not pass: FileNotFoundError, PermissionError or OSError."""

    def judge(error: Exception) -> Exception | None:
        status = _http_status(error)
        if status in (404, 410):
            return FileNotFoundError(errno.ENOENT, "no such file", location)
        if status in (401, 403) or isinstance(error, PermissionError) or _NO_LOGIN.search(type(error).__name__):
            return PermissionError(errno.EACCES, f"access denied ({said(error)})", location)
        if status is not None and 400 <= status < 500 and status not in _PASSING_STATUS:
            return OSError(errno.EINVAL, said(error), location)
        if isinstance(error, ValueError) or type(error).__name__ == "ParamValidationError":  # a malformed URL or option
            return UserError(f"{location}: {said(error)}")
        missing = isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
        if missing and status is None and not _lost_connection(error.__cause__):
            return FileNotFoundError(errno.ENOENT, "no such file", location)
        return None

    return judge


def _lost_connection(cause: BaseException | None) -> bool:
    """fsspec's HTTP raises FileNotFoundError for whatever keeps it from asking."""
    return isinstance(cause, (OSError, TimeoutError)) or type(cause).__module__.startswith("aiohttp")


def _http_status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of aiohttp, botocore, gcsfs, httpx or requests; None where there is none."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict):
            candidates = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
        else:
            candidates = [
                getattr(response, "status_code", None),
                *(getattr(error, n, None) for n in ("status", "code")),
            ]
        for status in candidates:
            if isinstance(status, int) and 100 <= status < 600:
                return status
        error = error.__cause__
    return None
