"""Sums between two log lines: loss and samples over all ranks, and this rank's time."""

import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Seconds inside `with` blocks: the host's, or on a GPU those that it needs for what they launch."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = self._since = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self._on_gpu:
            event: Any = torch.cuda.Event
            pair = event(enable_timing=True), event(enable_timing=True)
            self._events.append(pair)
            pair[0].record()
        else:
            self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._since

    def take(self) -> float:
        """Those since the last call. On a GPU, blocks that are not over there yet count at the next call."""
        done = [pair for pair in self._events if pair[1].query()]
        self._events = self._events[len(done) :]
        seconds: float = self._seconds + sum(first.elapsed_time(last) for first, last in done) / 1000
        self._seconds = 0.0
        return seconds


class Meter:
    """Loss and count are part of a checkpoint, so that a resumed run logs the same values; times are not."""

    def __init__(self) -> None:
        self.loss_sum, self.num_samples = 0.0, 0.0
        self._train_s = self._wait_s = self._timed_samples = 0.0
        self._paused_s = {"eval": 0.0, "save": 0.0}
        self._since = time.perf_counter()

    def timed(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; the time spent in fetching them counts as waiting for data."""
        while True:
            start = time.perf_counter()
            item = next(items, None)
            self._wait_s += time.perf_counter() - start
            if item is None:
                return
            yield item

    def add(self, loss_sum: float, num_samples: float) -> None:
        self.loss_sum += loss_sum
        self.num_samples += num_samples
        self._timed_samples += num_samples

    def pause(self) -> None:
        """Stop the clock of training: an evaluation or a save follows."""
        self._train_s += time.perf_counter() - self._since

    def resume(self, activity: str, seconds: float) -> None:
        """`activity`, eval or save, took `seconds`."""
        self._paused_s[activity] += seconds
        self._since = time.perf_counter()

    def take(self, forward_s: float) -> dict[str, float | int | None]:
        """Metrics of the interval that ends now; a new one begins. There is no loss where no update was made.

        `forward_s`: seconds of its forwards. They may overlap with waiting for data on a GPU.
        """
        self.pause()
        seconds = max(self._train_s, 1e-9)
        metrics: dict[str, float | int | None] = {
            "train/loss": self.loss_sum / self.num_samples if self.num_samples else None,
            "perf/images_per_s": self._timed_samples / seconds,
            "perf/data_wait": self._wait_s / seconds,
            "perf/seconds_data": self._wait_s,
            "perf/seconds_forward": forward_s,
            "perf/seconds_rest": max(0.0, seconds - self._wait_s - forward_s),
            "perf/seconds_eval": self._paused_s["eval"],
            "perf/seconds_save": self._paused_s["save"],
        }
        self.loss_sum, self.num_samples = 0.0, 0.0
        self._train_s = self._wait_s = self._timed_samples = 0.0
        self._paused_s = {"eval": 0.0, "save": 0.0}
        self._since = time.perf_counter()
        return metrics

    def state(self) -> dict[str, float]:
        return {"loss_sum": self.loss_sum, "num_samples": self.num_samples}

    def load(self, state: dict[str, float]) -> None:
        self.loss_sum, self.num_samples = state["loss_sum"], state["num_samples"]
