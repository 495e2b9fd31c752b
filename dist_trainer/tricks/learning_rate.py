"""The learning rate: a pure function of the step, so that a resumed run needs nothing but its step."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dist_trainer.by_name import Named, check_args, resolve
from dist_trainer.errors import Form, UserError
from dist_trainer.plan import Duration, DurationText, Plan
from dist_trainer.tricks.schedules import SCHEDULES

Rate = Annotated[float, Form("a rate above 0, such as 0.1", lambda value: value > 0)]
_DURATIONS = ("milestones", "every")
"""Durations in the built-in schedules: a bare 30 is refused, since it could mean steps or epochs."""
_FROM_START = ("piecewise", "exponential")
"""Schedules that lr.count_from: auto counts from the start of the run."""


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """Warm-up to the peak rate."""

    duration: DurationText = "0ep"
    """Linear warm-up of this length, one increment per step."""
    start: Literal["0", "base"] = "0"
    """From zero, or from the unscaled base rate (Goyal et al. 2017, section 2.2)."""


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """The learning rate at every step."""

    base: Rate | None = None
    """Rate per 256 samples of global batch, scaled by `scale`. `base` or `peak`, exactly one."""
    peak: Rate | None = None
    """The rate after warm-up, as it is."""
    scale: Literal["linear", "sqrt", "none"] = "linear"
    """How `base` grows with global_batch / 256 (linear: Goyal et al. 2017, section 2.1)."""
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    schedule: Named = field(default_factory=lambda: Named(name="cosine"))
    """constant; cosine(end: 0); polynomial(power: 1, end: 0); piecewise(milestones: [30ep, 60ep, 80ep], gamma: 0.1);
    exponential(gamma, every: 2ep, staircase: false); or package.module:Name(t, total, **args) -> factor of the peak.
    `end` is a fraction of the peak. Durations in args are written as 30ep, 500step or 10%, and arrive as steps."""
    count_from: Literal["auto", "start", "warmup"] = "auto"
    """Where a schedule's epochs count from: the start of the run, warm-up included, or the end of warm-up. auto: start
    for piecewise and exponential (Goyal et al. 2017: 30, 60 and 80 are epochs of the run), warmup for all others
    (cosine and polynomial begin at the peak)."""


class LearningRate:
    """`LearningRate(config, plan)(step)` is the rate of the update that step (0-based) makes."""

    def __init__(self, config: LearningRateConfig, plan: Plan) -> None:
        """Raises UserError for impossible rates, durations or schedules."""
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
        name = config.schedule.name
        counts_warmup = config.count_from == "start" or (config.count_from == "auto" and name in _FROM_START)
        self._begin = 0 if counts_warmup else self.warmup
        self._total = plan.total_steps - self._begin
        self._name, self._schedule = name, resolve("lr.schedule.name", name, SCHEDULES, "schedule")
        self._args = {
            key: _in_steps(f"lr.schedule.args.{key}", value, plan, must=name in SCHEDULES and key in _DURATIONS)
            for key, value in config.schedule.args.items()
        }
        check_args("lr.schedule", name, self._schedule, self._args, 0, self._total)
        for step in (self.warmup, (self.warmup + plan.total_steps) // 2, plan.total_steps - 1):
            try:
                self(step)
            except (TypeError, ValueError, ArithmeticError) as error:
                raise UserError(f"lr.schedule.args: {name}: {error}") from None
        if name == "piecewise" and self._begin < self.warmup and round(self._args["milestones"][0]) <= self.warmup:
            raise UserError(
                f"lr.schedule.args.milestones: {config.schedule.args['milestones'][0]} lies within the {self.warmup} "
                "steps of warm-up; move it, shorten warm-up, or set lr.count_from: warmup"
            )

    def __call__(self, step: int) -> float:
        """Raises UserError if a user's schedule gives no rate."""
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        factor = float(self._schedule(step - self._begin, self._total, **self._args))
        if not 0.0 <= factor < math.inf:
            raise UserError(f"lr.schedule: {self._name} gives the factor {factor} at step {step}; it must be >= 0")
        return self.peak * factor


def _in_steps(key: str, value: Any, plan: Plan, *, must: bool) -> Any:
    """An argument of a schedule, with the durations in it as steps (float, not rounded). `must`: it is nothing else."""
    if isinstance(value, list):
        return [_in_steps(key, each, plan, must=must) for each in value]
    if must or (isinstance(value, str) and Duration.is_one(value)):
        return plan.steps(Duration.parse(value, key))
    return value
