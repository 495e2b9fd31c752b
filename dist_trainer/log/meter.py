"""Sums between two log lines: loss and samples over all ranks, and this rank's time."""

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class Meter:
    """Loss and count are part of a checkpoint, so that a resumed run logs the same values; times are not."""

    def __init__(self) -> None:
        self.loss_sum, self.num_samples = 0.0, 0.0
        self._restart()

    def _restart(self) -> None:
        self._since = time.perf_counter()
        self._train_s = self._wait_s = self._timed_samples = 0.0

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
        """Stop the clock: an evaluation or a save follows."""
        self._train_s += time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()

    def take(self) -> dict[str, float | int | None]:
        """Metrics of the interval that ends now; a new one begins. There is no loss where no update was made."""
        self.pause()
        seconds = max(self._train_s, 1e-9)
        metrics: dict[str, float | int | None] = {
            "train/loss": self.loss_sum / self.num_samples if self.num_samples else None,
            "perf/images_per_s": self._timed_samples / seconds,
            "perf/data_wait": self._wait_s / seconds,
        }
        self.loss_sum, self.num_samples = 0.0, 0.0
        self._restart()
        return metrics

    def state(self) -> dict[str, float]:
        return {"loss_sum": self.loss_sum, "num_samples": self.num_samples}

    def load(self, state: dict[str, float]) -> None:
        self.loss_sum, self.num_samples = state["loss_sum"], state["num_samples"]
