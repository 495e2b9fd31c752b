"""Shapes of the learning rate over a run: (t, total, **args) -> factor on the peak rate, pure functions of the step.

`t` is 0 where the schedule begins, and less than `total`; durations arrive as steps. Each raises ValueError for
arguments that make no decay.
"""

import math
from collections.abc import Callable, Sequence


def constant(t: int, total: int) -> float:
    """1 throughout."""
    return 1.0


def cosine(t: int, total: int, *, end: float = 0.0) -> float:
    """From 1 at t=0 along a half cosine to `end` (a fraction of the peak) at t=total (Loshchilov 2017, eq. 5)."""
    _check_end(end)
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * t / total))


def polynomial(t: int, total: int, *, power: float = 1.0, end: float = 0.0) -> float:
    """From 1 to `end` (a fraction of the peak) as (1 - t / total) ** power; power 1 is a straight line."""
    _check_end(end)
    if not power > 0:
        raise ValueError(f"power {power} is not positive")
    return end + (1.0 - end) * math.pow(1.0 - t / total, power)


def piecewise(t: int, total: int, *, milestones: Sequence[float], gamma: float = 0.1) -> float:
    """`gamma` to the number of milestones reached: the step of a milestone is the first with the lower rate.

    Goyal et al. 2017, section 5.1, divide by 10 at epochs 30, 60 and 80 of 90.
    """
    _check_gamma(gamma)
    if not isinstance(milestones, Sequence) or not milestones:
        raise ValueError("milestones must be a list such as [30ep, 60ep, 80ep]")
    steps = [round(each) for each in milestones]
    if not all(a < b for a, b in zip([0, *steps], [*steps, total], strict=True)):
        raise ValueError(
            f"milestones are steps {', '.join(map(str, steps))}; they must ascend, between 0 and the {total} steps here"
        )
    return gamma ** sum(each <= t for each in steps)


def exponential(t: int, total: int, *, gamma: float, every: float, staircase: bool = False) -> float:
    """`gamma` to the power t / every; of its whole part with `staircase`.

    torchvision's MobileNetV3: gamma 0.973, every 2ep, staircase.
    """
    _check_gamma(gamma)
    if not every > 0:
        raise ValueError(f"every is {every:g} steps; it must be positive")
    # The small term keeps 3 * (1/3 epoch) from falling just below a whole number.
    return float(gamma ** (math.floor(t / every + 1e-9) if staircase else t / every))


def _check_end(end: float) -> None:
    if not 0.0 <= end <= 1.0:
        raise ValueError(f"end {end} is not in [0, 1]: it is a fraction of the peak")


def _check_gamma(gamma: float) -> None:
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma {gamma} is not in (0, 1]")


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "cosine": cosine,
    "polynomial": polynomial,
    "piecewise": piecewise,
    "exponential": exponential,
}
