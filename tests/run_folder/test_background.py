"""The writer behind training: copies at once, writes later, one at a time, and loses no error."""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_trainer.errors import LocalError, UserError
from dist_trainer.run_folder.background import BackgroundWriter, HostCopies
from dist_trainer.tensors import State

Write = Callable[[dict[str, State]], str | None]


def states(value: float) -> dict[str, State]:
    weight = torch.full((2, 3, 4, 4), value).to(memory_format=torch.channels_last)
    return {"model": {"weight": weight, "steps": torch.tensor(int(value))}}


class Slow:
    """A write that waits until it is let go, and remembers what it saw."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.go, self.began, self.seen, self.error = threading.Event(), threading.Event(), list[float](), error

    def __call__(self, copies: dict[str, State]) -> str | None:
        self.began.set()
        assert self.go.wait(30)
        if self.error is not None:
            raise self.error
        self.seen.append(float(copies["model"]["weight"].sum()))
        return None


def refuses(copies: dict[str, State]) -> str | None:
    raise UserError("cannot save here: No space left on device")


def writes(copies: dict[str, State]) -> str | None:
    return None


def test_what_is_written_is_what_was_handed_over_whatever_training_does_meanwhile(tmp_path: Path) -> None:
    """`submit` returns while the write has not begun to read. Mutations: hand the tensors themselves over; wait."""
    writer, slow, tensors = BackgroundWriter(tmp_path), Slow(), states(2.0)
    assert writer.submit("checkpoint", 1, tensors, slow)
    tensors["model"]["weight"].fill_(7.0)
    slow.go.set()
    assert writer.wait()
    assert slow.seen == [2.0 * 96]


def test_the_next_of_a_kind_waits_for_the_one_before_and_others_keep_their_order(tmp_path: Path) -> None:
    """So memory for each kind is used again, and best weights are on the disk before the checkpoint that names them.

    Mutations: copy before waiting; a thread per write.
    """
    writer, slow, order = BackgroundWriter(tmp_path), Slow(), list[str]()

    def note(name: str) -> Write:
        return lambda copies: order.append(f"{name} {copies['model']['weight'].mean():g}")  # type: ignore[func-returns-value]

    writer.submit("best", 1, states(1.0), slow)
    writer.submit("checkpoint", 1, states(2.0), note("checkpoint"))  # does not wait for another kind
    assert slow.began.wait(30)
    assert not order
    threading.Timer(0.2, slow.go.set).start()
    writer.submit("best", 2, states(3.0), note("best"))
    assert slow.seen == [96.0]
    assert writer.wait()
    assert order == ["checkpoint 2", "best 3"]


def test_a_stopped_run_does_not_wait_longer_than_it_may(tmp_path: Path) -> None:
    """Neither for the one before nor at its end; the stop may come while it waits; and says what is missing.

    Mutations: wait without a deadline; look at it once; a checkpoint is written whose best weights were left out; the
    one that was left out is not missed.
    """
    writer, slow, ends = BackgroundWriter(tmp_path), Slow(), list[float]()
    writer.until = lambda: ends[0] if ends else None
    writer.submit("best", 1, states(1.0), slow)
    threading.Timer(0.3, lambda: ends.append(time.monotonic() + 0.1)).start()
    assert not writer.submit("best", 2, states(2.0), slow)
    assert writer.finish() == "the best of step 1 could not be written in time"
    slow.go.set()
    ends[0] = math.inf
    assert writer.wait()
    assert not writer.submit("checkpoint", 2, states(2.0), writes)
    assert writer.finish() == "the best of step 2 could not be written in time"


def test_a_refusal_is_told_once_with_bytes_and_counted_until_one_succeeds(tmp_path: Path) -> None:
    """Mutations: raise it; lose it; count best weights as checkpoints; never reset the count."""
    writer = BackgroundWriter(tmp_path, max_failed=3)
    writer.submit("best", 1, states(1.0), refuses)
    for step in (1, 2):
        writer.submit("checkpoint", step, states(1.0), refuses)
        writer.wait()
        assert writer.failed_in_a_row == step
        assert writer.gives_up is None
    lines = writer.tell()
    assert len(lines) == 3, lines  # best is tried again before each checkpoint, and told once
    assert "No space left on device; 0.392 kB are needed there, and " in lines[-1]
    assert lines[-1].endswith("are free (2 of 3 in a row)")
    assert not writer.tell()
    writer.submit("checkpoint", 3, states(1.0), writes)
    writer.wait()
    assert writer.failed_in_a_row == 0
    for _ in range(3):
        writer.submit("checkpoint", 4, states(1.0), refuses)
    writer.wait()
    assert writer.gives_up is not None
    assert writer.gives_up.startswith("3 checkpoints in a row could not be written: cannot save here")


def test_what_failed_is_written_later_unless_a_newer_one_took_its_place(tmp_path: Path) -> None:
    """Mutations: forget it; write the older after the newer; report it at the end all the same."""
    writer, full, written = BackgroundWriter(tmp_path), [True], list[float]()

    def write(copies: dict[str, State]) -> str | None:
        if full[0]:
            raise OSError(28, "No space left on device")
        written.append(float(copies["model"]["weight"].mean()))
        return None

    writer.submit("best", 1, states(1.0), write)
    writer.submit("best", 2, states(2.0), write)
    writer.submit("snapshot", 2, states(3.0), write)
    writer.wait()
    full[0] = False
    writer.submit("checkpoint", 3, states(4.0), write)
    writer.wait()
    assert written == [2.0, 3.0, 4.0]
    full[0] = True
    writer.submit("checkpoint", 4, states(5.0), write)
    writer.wait()
    full[0] = False
    assert writer.finish() is None
    assert written[-1] == 5.0


@pytest.mark.parametrize("error", [LocalError("another trainer has taken it over"), ZeroDivisionError("a bug")])
def test_another_error_is_raised_by_the_next_call(tmp_path: Path, error: Exception) -> None:
    """Mutation: catch it on the thread."""
    for call in ("tell", "wait", "submit", "finish"):
        writer, slow = BackgroundWriter(tmp_path), Slow(error)
        writer.submit("checkpoint", 1, states(1.0), slow)
        slow.go.set()
        until = time.monotonic() + 30
        while writer._running or writer._waiting:
            assert time.monotonic() < until
            time.sleep(0.001)
        with pytest.raises(type(error)):
            writer.submit("checkpoint", 2, states(1.0), writes) if call == "submit" else getattr(writer, call)()


def test_memory_for_copies_is_used_again_and_keeps_the_layout() -> None:
    """Mutations: allocate each time; a buffer of another shape is kept."""
    copies = HostCopies()
    first = copies.take("best", states(1.0))["model"]["weight"]
    second = copies.take("best", states(2.0))["model"]["weight"]
    assert first.data_ptr() == second.data_ptr()
    assert second.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(second, states(2.0)["model"]["weight"])
    other = copies.take("best", {"model": {"weight": torch.ones(5)}})["model"]["weight"]
    assert torch.equal(other, torch.ones(5))
    assert copies.take("checkpoint", states(1.0))["model"]["weight"].data_ptr() != second.data_ptr()


def test_a_finished_writer_leaves_no_thread(tmp_path: Path) -> None:
    """It holds host memory, and a roll-back begins another. Mutation: the thread waits for ever."""
    writer = BackgroundWriter(tmp_path)
    writer.submit("checkpoint", 1, states(1.0), writes)
    assert writer.finish() is None
    assert writer._thread is not None
    writer._thread.join(30)
    assert not writer._thread.is_alive()


def test_without_background_a_write_is_over_when_it_was_handed_over(tmp_path: Path) -> None:
    written = list[float]()

    def write(copies: dict[str, State]) -> str | None:
        time.sleep(0.05)
        written.append(1.0)
        return None

    writer = BackgroundWriter(tmp_path, in_background=False)
    writer.submit("checkpoint", 1, states(1.0), write)
    assert written == [1.0]
