"""Exponential moving average of the weights: float32, once per applied update, without communication.

Each rank averages what it keeps of the weights: rank 0 all of them, or at ZeRO 3 every rank its own piece. Batch-norm's
running statistics are equal on all ranks and averaged on each.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from dist_trainer.errors import UserError
from dist_trainer.plan import DurationText
from dist_trainer.tensors import State


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """A second set of weights that follows training slowly; validated and saved beside the first."""

    decay: float | None = None
    """The share of the average that each update keeps: 0.9999 for long runs, 0.999 for short ones; null: no average."""
    ramp: Literal["constant", "threshold", "exponential"] = "constant"
    """How the decay grows over updates s of S: not at all; min(decay, (1 + s) / (10 + s)); decay * (1 - exp(-beta * s /
    S))."""
    beta: float = 15.0
    """Of the exponential ramp: at 15, 99% of the decay is reached after 31% of the run."""
    start: DurationText = "0step"
    """When the average begins, as a copy of the weights."""
    every: int = 1
    """Update the average at every n-th update, with the decay to the power n."""
    device: Literal["same", "cpu"] = "same"
    """Where the average is kept: with the weights, or in host memory (each update then copies the weights there, while
    the next step is computed)."""

    def check(self) -> None:
        """Raises UserError for impossible values."""
        if self.decay is not None and not 0.0 <= self.decay < 1.0:
            raise UserError(f"ema.decay: {self.decay} is not in [0, 1); null turns the average off")
        if self.every < 1:
            raise UserError(f"ema.every: {self.every} is not a positive number of updates")
        if not self.beta > 0:
            raise UserError(f"ema.beta: {self.beta} is not positive")


def decay_at(config: EmaConfig, step: int, total: int) -> float:
    """The decay of the update number `step` (from 0) of `total` after the start.

    The ramps are those of super-gradients' ema_decay_schedules.py (threshold as in TensorFlow's
    ExponentialMovingAverage), with updates where that counts micro-batches.
    """
    assert config.decay is not None
    if config.ramp == "threshold":
        return min(config.decay, (1 + step) / (10 + step))
    if config.ramp == "exponential":
        return config.decay * (1 - math.exp(-config.beta * step / total))
    return config.decay


class _OnHost:
    """Copies of `values` in host memory, pinned where they are on a device, made on a stream of their own."""

    def __init__(self, values: list[torch.Tensor]) -> None:
        self._values, self._device = values, values[0].device
        on_gpu = self._device.type == "cuda"
        self.copies = [torch.empty_like(value, device="cpu", pin_memory=on_gpu) for value in values]
        self._side = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._done: torch.cuda.Event | None = None

    def launch(self) -> None:
        """Copy the values as they are now. They must not change before `wait`."""
        if self._side is None:
            torch._foreach_copy_(self.copies, self._values)
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            torch._foreach_copy_(self.copies, self._values, non_blocking=True)
        self._done = self._side.record_event()

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()


class Ema:
    """`weights` and `statistics` are the average once it `has_begun`. Updates that were not applied do not count."""

    def __init__(self, config: EmaConfig, live: State, statistics: torch.Tensor, start: int, total: int) -> None:
        """`live`: the float32 weights that this rank averages, which change in place; on some ranks none.

        `statistics`: float32 [2C], where training starts. `start`, `total`: in applied updates of the run.
        """
        self._config, self._start, self._total = config, start, max(1, total - start)
        device = torch.device("cpu") if config.device == "cpu" else None
        self._weights = {name: value.to(device, copy=True) for name, value in live.items()}
        self._live, self._averages = list(live.values()), list(self._weights.values())
        self._on_host = _OnHost(self._live) if device is not None and live else None
        self._pending: float | None = None
        """The weight of the copies on the host that are not in the average yet."""
        self.statistics = statistics.clone()
        self.num_updates = 0
        """Applied updates of the run so far."""
        self._num_followed = 0

    @property
    def weights(self) -> State:
        self.settle()
        return self._weights

    @property
    def has_begun(self) -> bool:
        return self.num_updates > self._start or not self._start

    @property
    def decay(self) -> float:
        """The decay of the last update."""
        return decay_at(self._config, max(0, self.num_updates - 1 - self._start), self._total)

    def _weight(self, number: int) -> float | None:
        """The weight of the new values at the update with this number (from 0); None: no change."""
        step = number - self._start
        if step < 0:
            return 1.0 if step == -1 else None  # the average begins as a copy
        if (step + 1) % self._config.every:
            return None
        return float(1.0 - decay_at(self._config, step, self._total) ** self._config.every)

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights. Call it after every applied update."""
        weight = self._weight(self.num_updates)
        self.num_updates += 1
        if weight is None or not self._live:
            return
        if self._on_host is None:
            torch._foreach_lerp_(self._averages, self._live, weight)
        else:
            self.settle()
            self._on_host.launch()
            self._pending = weight

    @torch.no_grad()
    def settle(self) -> None:
        """Bring an average on the host up to date. Call it before the weights change, best while the device computes:
        the weights of the last update may still be on their way."""
        if self._pending is not None and self._on_host is not None:
            self._on_host.wait()
            torch._foreach_lerp_(self._averages, self._on_host.copies, self._pending)
            self._pending = None

    def update_statistics(self, statistics: torch.Tensor) -> None:
        """Add the running statistics (float32 [2C]) of the next applied update, one step after its weights."""
        weight = self._weight(self._num_followed)
        self._num_followed += 1
        if weight is not None:
            self.statistics.lerp_(statistics, weight)

    def begin_after(self, num_updates: int) -> None:
        """Resume without an average of those updates: it begins now, as a copy of the weights, or at its start."""
        self.num_updates = self._num_followed = num_updates

    def load(self, weights: State, statistics: torch.Tensor, num_updates: int) -> None:
        """Resume from a checkpoint: this rank's share of the weights, and the statistics."""
        for name, value in self.weights.items():
            value.copy_(weights[name])
        self.statistics.copy_(statistics)
        self.num_updates = self._num_followed = num_updates
