"""The learning rate: a pure function of the step, so that a resumed run needs nothing but its step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from dist_trainer.errors import UserError
from dist_trainer.named import Named, check_args, resolve
from dist_trainer.plan import Duration, Plan


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """The way up to the peak rate."""

    duration: str = "0ep"
    """Linear warm-up of this length, one increment per step."""
    start: Literal["0", "base"] = "0"
    """From zero, or from the unscaled base rate (Goyal et al. 2017, section 2.2)."""


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """The learning rate at every step."""

    base: float | None = None
    """Rate per 256 samples of global batch, scaled by `scale`. `base` or `peak`, exactly one."""
    peak: float | None = None
    """The rate after warm-up, as it is."""
    scale: Literal["linear", "sqrt", "none"] = "linear"
    """How `base` grows with global_batch / 256 (linear: Goyal et al. 2017, section 2.1)."""
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    schedule: Named = field(default_factory=lambda: Named(name="cosine"))
    """cosine or constant, counted from the end of warm-up; or package.module:Name(t, total, **args) -> factor."""


def constant(t: int, total: int) -> float:
    """1 throughout."""
    return 1.0


def cosine(t: int, total: int, *, end: float = 0.0) -> float:
    """From 1 at t=0 along a half cosine to `end` (a fraction of the peak) at t=total (Loshchilov 2017, eq. 5)."""
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * t / total))


SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "cosine": cosine}


class LearningRate:
    """`LearningRate(config, plan)(step)` is the rate of the update that step (0-based) makes."""

    def __init__(self, config: LearningRateConfig, plan: Plan) -> None:
        """Raises UserError for rates or durations that cannot be."""
        if (config.base is None) == (config.peak is None):
            both = "both are" if config.base is not None else "neither is"
            raise UserError(f"lr: give exactly one of lr.base and lr.peak; {both} set")
        ratio = plan.global_batch / 256
        factor = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[config.scale]
        self.peak = config.peak if config.peak is not None else config.base * factor  # type: ignore[operator]
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise UserError(f"lr: the peak rate is {self.peak}; it must be positive")
        if config.warmup.start == "base" and config.base is None:
            raise UserError("lr.warmup.start: 'base' needs lr.base; with lr.peak write start: '0'")
        self.start = 0.0 if config.warmup.start == "0" else config.base or 0.0
        self.warmup = round(plan.steps(Duration.parse(config.warmup.duration, "lr.warmup.duration")))
        if self.warmup >= plan.total_steps:
            raise UserError(
                f"lr.warmup.duration: {config.warmup.duration} is {self.warmup} steps, "
                f"but the whole run has {plan.total_steps}"
            )
        self._total = plan.total_steps - self.warmup
        self._args = config.schedule.args
        self._schedule = resolve("lr.schedule.name", config.schedule.name, SCHEDULES, "schedule")
        check_args("lr.schedule", config.schedule.name, self._schedule, self._args, 0, self._total)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        return self.peak * float(self._schedule(step - self.warmup, self._total, **self._args))
