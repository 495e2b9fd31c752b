"""World x micro-batch x accumulation = global batch, and durations in steps: the only owner of this arithmetic.

A global batch of G samples is M = G / m slots of m samples (messages call a slot a micro-batch). Rank r of W
owns slots [r*M//W, (r+1)*M//W) and runs ceil(M/W) forwards; the surplus ones are ghosts: weight 0, no
batch-norm update, there only so that collectives inside a forward match.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

from dist_trainer.errors import UserError

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ep|step|sample|%)s?\s*")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many samples stand together."""

    global_batch: int = 256
    """Samples per update, on any number of devices."""
    micro_batch: int = 32
    """Samples per forward, and the group that batch-norm sees. Divides global_batch."""


@dataclass(frozen=True)
class Duration:
    """An amount of training: `90ep`, `500step`, `128000sample` or `5%` (of the run)."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str, name: str) -> "Duration":
        """Raises UserError naming the key `name` for anything but a number with a unit."""
        match = _DURATION.fullmatch(str(text))
        if not match:
            raise UserError(f"{name}: {text!r} is not a duration; write for instance 90ep, 500step, 128000sample or 5%")
        return cls(float(match[1]), match[2])


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _neighbours(value: int, legal: list[int]) -> str:
    """The legal values next to `value`, the nearest first."""
    below = [v for v in legal if v < value][-1:]
    above = [v for v in legal if v > value][:1]
    return " or ".join(str(v) for v in sorted(below + above, key=lambda v: abs(v - value)))


def num_slots(batch: BatchConfig, world: int = 1) -> int:
    """M = G / m. Raises UserError when m does not divide G, with the nearest values that do and feed `world` ranks."""
    g, m = batch.global_batch, batch.micro_batch
    for key, value in (("global_batch", g), ("micro_batch", m)):
        if value < 1:
            raise UserError(f"batch.{key}: {value} is not a positive number of samples")
    if g % m:
        legal_m = divisors(g)
        near = _neighbours(m, legal_m)
        feeding = [d for d in legal_m if g // d >= world] or legal_m
        pasted = _neighbours(m, feeding).split(" ", maxsplit=1)[0]
        multiples = _neighbours(g, [m * k for k in (g // m, g // m + 1) if k])
        raise UserError(
            f"batch.micro_batch: {m} does not divide batch.global_batch: {g}; nearest micro-batches: {near}, "
            f"nearest global batches: {multiples}. Paste: --batch.micro_batch {pasted}"
        )
    return g // m


def largest_world(batch: BatchConfig, num_devices: int) -> int:
    """The largest world <= num_devices that this batch can feed: min(M, num_devices)."""
    return max(1, min(num_slots(batch), num_devices))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything derived from batch, world, training set and duration. Build it with `make_plan`."""

    global_batch: int
    micro_batch: int
    num_slots: int
    world: int
    num_samples: int
    total_steps: int

    @property
    def forwards(self) -> int:
        """Forwards per rank and step, ghosts included: ceil(M / W)."""
        return -(-self.num_slots // self.world)

    @property
    def efficiency(self) -> float:
        """Share of the forwards that count: M / (W * ceil(M / W))."""
        return self.num_slots / (self.world * self.forwards)

    @property
    def chunk(self) -> int:
        """Samples that stay together in the order: the largest divisor of micro_batch up to 8."""
        return max(d for d in divisors(self.micro_batch) if d <= 8)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps that see every training sample once; the last one may be partly masked."""
        return -(-self.num_samples // self.global_batch)

    def slots_of(self, rank: int) -> range:
        """The consecutive slots that `rank` owns."""
        return range(rank * self.num_slots // self.world, (rank + 1) * self.num_slots // self.world)

    def num_valid(self, step: int) -> int:
        """Samples that count in `step`: G, or what is left of the epoch."""
        start = step % self.steps_per_epoch * self.global_batch
        return min(self.global_batch, self.num_samples - start)

    def steps(self, duration: Duration) -> float:
        """`duration` in steps of this run, not rounded."""
        per_unit = {
            "step": 1.0,
            "ep": float(self.steps_per_epoch),
            "sample": 1.0 / self.global_batch,
            "%": self.total_steps / 100.0,
        }
        return duration.amount * per_unit[duration.unit]

    def due(self, num_steps: int, every: Duration | None) -> bool:
        """Whether something that happens `every` so often, and at the end, is due after `num_steps` steps."""
        if num_steps == self.total_steps:
            return True
        if every is None:
            return False
        interval = max(1.0, self.steps(every))
        # The small term keeps 3 * (1/3 epoch) from falling just below a whole number.
        return math.floor(num_steps / interval + 1e-9) > math.floor((num_steps - 1) / interval + 1e-9)

    def epoch(self, num_steps: int) -> float:
        """Epochs that `num_steps` steps make."""
        return num_steps / self.steps_per_epoch


def make_plan(batch: BatchConfig, duration: Duration, *, world: int, num_samples: int) -> Plan:
    """The plan of a run. Raises UserError, with a line to paste, for a world or a batch that cannot be."""
    if world < 1:
        raise UserError(f"a world of {world} ranks cannot train; start at least 1")
    slots = num_slots(batch, world)
    if world > slots:
        smaller = max((d for d in divisors(batch.global_batch) if batch.global_batch // d >= world), default=0)
        change = (
            f"; or --batch.micro_batch {smaller}, which changes what batch-norm sees"
            if smaller
            else f"; batch.global_batch {batch.global_batch} feeds at most {batch.global_batch} ranks"
        )
        raise UserError(
            f"{world} ranks, but batch.global_batch {batch.global_batch} / batch.micro_batch {batch.micro_batch} = "
            f"{slots} micro-batches: {world - slots} ranks would idle. "
            f"Paste: torchrun --nproc-per-node {slots}{change}"
        )
    if num_samples < batch.global_batch:
        _refuse_small_set(batch, world, num_samples)
    plan = Plan(
        global_batch=batch.global_batch,
        micro_batch=batch.micro_batch,
        num_slots=slots,
        world=world,
        num_samples=num_samples,
        total_steps=0,
    )
    if duration.unit == "%":
        raise UserError(f"duration: {duration.amount:g}% has nothing to be a part of; write epochs, steps or samples")
    total = math.ceil(plan.steps(duration) - 1e-9)
    if total < 1:
        raise UserError(f"duration: {duration.amount:g}{duration.unit} is less than one step")
    return replace(plan, total_steps=total)


def _refuse_small_set(batch: BatchConfig, world: int, num_samples: int) -> NoReturn:
    """Fewer samples than one global batch: offer the largest batch that they fill and that feeds `world` ranks."""
    micro = min(batch.micro_batch, num_samples // world)
    offer = f"--batch.global_batch {num_samples // max(micro, 1) * micro}"
    if micro != batch.micro_batch:
        offer += f" --batch.micro_batch {micro}"
    what = "global_batch" if num_samples >= batch.micro_batch else "micro_batch"
    raise UserError(
        f"the training set has {num_samples} samples, fewer than batch.{what} {getattr(batch, what)}"
        + (f". Paste: {offer}" if micro else f" and than the {world} ranks; start fewer")
    )
