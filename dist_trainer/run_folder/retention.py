"""Which checkpoints are kept: the last ones, the best ones by a metric, and every n-th."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What `kept` decides by."""

    last: int = 1
    best: int = 0
    metric: tuple[str, str] = ("model", "top1")
    """Of `best`: (weights, metric), by their names in a checkpoint's state."""
    larger_is_better: bool = True
    for_ever: Callable[[int], bool] = lambda step: False
    """Whether the checkpoint of a step stays whatever comes."""

    def value(self, state: Mapping[str, object]) -> float | None:
        """The metric that a checkpoint with this `state` was saved with; None if it was not evaluated."""
        last = state.get("last")
        if not isinstance(last, Mapping) or state.get("evaluated_step") != state.get("step"):
            return None
        weights, name = self.metric
        value = last.get(weights, {}).get(name)
        return value if value is not None and math.isfinite(value) else None

    def kept(self, values: Mapping[int, float | None]) -> set[int]:
        """Of checkpoints {step: metric}, the steps of those that stay. Of equally good ones the older is better."""
        steps = sorted(values, reverse=True)
        sign = -1.0 if self.larger_is_better else 1.0
        ranked = sorted((sign * value, step) for step, value in values.items() if value is not None)
        return {
            *steps[: self.last],
            *(step for _, step in ranked[: self.best]),
            *(step for step in steps if self.for_ever(step)),
        }
