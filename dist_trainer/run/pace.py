"""How long a run still takes, evaluations and saves included."""

from dataclasses import dataclass, field

from dist_trainer.plan import Duration, Plan
from dist_trainer.run.blueprint import Intervals

RECENT = 0.3
"""Weight of the newest measurement of a step's time."""


@dataclass
class Pace:
    """Fed with what took how long; times of this attempt alone."""

    plan: Plan
    intervals: Intervals
    step_s: float | None = None
    _step: int | None = None
    _paused: dict[str, list[float]] = field(default_factory=lambda: {"eval": [], "save": []})

    def trained(self, step: int, seconds: float) -> None:
        """Training up to `step` took `seconds` since the last call. The first interval, with its start-up, is passed
        over."""
        if self._step is not None and step > self._step:
            now = seconds / (step - self._step)
            self.step_s = now if self.step_s is None else (1 - RECENT) * self.step_s + RECENT * now
        self._step = step

    def paused(self, activity: str, seconds: float) -> None:
        """One evaluation (`eval`) or checkpoint (`save`) took this long."""
        self._paused[activity].append(seconds)

    def left_s(self, step: int) -> float | None:
        """Seconds from `step` to the end. What was not seen yet counts nothing; None before anything was seen."""
        if self.step_s is None:
            return None
        left = (self.plan.total_steps - step) * self.step_s
        every: dict[str, Duration | None] = {"eval": self.intervals.eval, "save": self.intervals.checkpoint}
        for activity, seconds in self._paused.items():
            if seconds:
                left += self.plan.num_due(step, every[activity]) * sum(seconds) / len(seconds)
        return left
