"""World x micro-batch x accumulation = global batch, and durations in steps: the only owner of this arithmetic.

A global batch of G samples is M = G / m slots of m samples (messages call a slot a micro-batch). Rank r of W owns slots
[r*M//W, (r+1)*M//W) and runs ceil(M/W) forwards; the surplus ones are ghosts: weight 0, no batch-norm update. They
exist only so that collectives inside a forward match.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NoReturn

from dist_trainer.errors import Form, UserError

Tail = Literal["mask", "carry", "drop"]
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ep|step|sample|%)s?\s*")
_A_DURATION = "a duration, such as 90ep, 500step, 128000sample or 5%"
DurationText = Annotated[str, Form(_A_DURATION, lambda text: _DURATION.fullmatch(text) is not None)]
"""The type of a key whose text `Duration.parse` takes."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Samples per update and per forward."""

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
            raise UserError(f"{name}: {text!r} is not {_A_DURATION}")
        return cls(float(match[1]), match[2])

    @staticmethod
    def is_one(text: str) -> bool:
        """Whether `parse` takes it."""
        return _DURATION.fullmatch(text) is not None


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


@dataclass(frozen=True)
class Span:
    """Positions [start, stop) of an epoch's order; they fill a batch without counting where `counts` is false."""

    epoch: int
    start: int
    stop: int
    counts: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything derived from batch, world, training set and duration. Build it with `make_plan`.

    With repeated augmentation, a step holds G / repeats different samples, `repeats` copies of each in different
    slots, and an epoch N / repeats of the N samples.
    """

    global_batch: int
    micro_batch: int
    num_slots: int
    world: int
    num_samples: int
    total_steps: int
    tail: Tail = "mask"
    repeats: int = 1

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

    @property
    def samples_per_step(self) -> int:
        """Different samples in one step."""
        return self.global_batch // self.repeats

    @property
    def samples_per_epoch(self) -> int:
        """Different samples in one epoch."""
        return self.num_samples // self.repeats

    @property
    def steps_per_epoch(self) -> float:
        """Steps of one epoch: whole with the tails mask and drop, N / G with carry."""
        if self.tail == "carry":
            return self.samples_per_epoch / self.samples_per_step
        return self._whole_steps

    @property
    def _whole_steps(self) -> int:
        samples, batch = self.samples_per_epoch, self.samples_per_step
        return samples // batch if self.tail == "drop" else -(-samples // batch)

    def slots_of(self, rank: int) -> range:
        """The consecutive slots that `rank` owns."""
        return range(rank * self.num_slots // self.world, (rank + 1) * self.num_slots // self.world)

    def num_valid(self, step: int) -> int:
        """Samples that count in `step`: G, or what is left of the epoch with the tail mask."""
        if self.tail != "mask":
            return self.global_batch
        start = step % self._whole_steps * self.samples_per_step
        return min(self.samples_per_step, self.samples_per_epoch - start) * self.repeats

    def copy_of(self, slot: int) -> int:
        """Which copy of its samples a slot holds, from 0; 0 without repeated augmentation."""
        return slot // (self.num_slots // self.repeats)

    def spans(self, step: int, slot: int) -> list[Span]:
        """The positions of a slot's m samples in the epochs' orders: one span, or two at the end of an epoch.

        There, `mask` fills the slot with the epoch's first samples, which do not count; `carry` continues with the next
        epoch. A pure function of (step, slot), so that a resumed run and another world see the same samples.
        """
        first = slot % (self.num_slots // self.repeats) * self.micro_batch
        if self.tail == "carry":
            epoch, start = divmod(step * self.samples_per_step + first, self.samples_per_epoch)
        else:
            epoch, start = step // self._whole_steps, step % self._whole_steps * self.samples_per_step + first
        end = self.samples_per_epoch
        over = max(start + self.micro_batch - end, 0)
        spans = [Span(epoch, start, start + self.micro_batch - over)] if over < self.micro_batch else []
        if over:
            skipped = max(start - end, 0)  # a slot that lies entirely past the end
            carried = self.tail == "carry"
            spans.append(Span(epoch + carried, skipped, over, counts=carried))
        return spans

    def position(self, num_steps: int) -> int:
        """Samples consumed by `num_steps` steps, copies counted once: the data's state in a checkpoint."""
        if self.tail == "carry":
            return num_steps * self.samples_per_step
        epochs, steps = divmod(num_steps, self._whole_steps)
        per_epoch = min(self._whole_steps * self.samples_per_step, self.samples_per_epoch)
        return epochs * per_epoch + steps * self.samples_per_step

    def steps(self, duration: Duration) -> float:
        """`duration` in steps of this run, not rounded."""
        per_unit = {
            "step": 1.0,
            "ep": self.steps_per_epoch,
            "sample": 1.0 / self.global_batch,
            "%": self.total_steps / 100.0,
        }
        return duration.amount * per_unit[duration.unit]

    def due(self, num_steps: int, every: Duration | None) -> bool:
        """Whether something that happens at this interval, and at the end, is due after `num_steps` steps."""
        if num_steps == self.total_steps:
            return True
        if every is None:
            return False
        interval = max(1.0, self.steps(every))
        # The small term keeps 3 * (1/3 epoch) from falling just below a whole number.
        return math.floor(num_steps / interval + 1e-9) > math.floor((num_steps - 1) / interval + 1e-9)

    def is_nth(self, num_steps: int, every: Duration | None, n: int) -> bool:
        """Whether what is due after `num_steps` steps is the n-th, the 2n-th, ... of its kind."""
        if every is None or not n or not self.due(num_steps, every):
            return False
        return math.floor(num_steps / max(1.0, self.steps(every)) + 1e-9) % n == 0

    def num_due(self, num_steps: int, every: Duration | None) -> int:
        """How often `due` says yes after `num_steps`, up to the end."""
        if num_steps >= self.total_steps:
            return 0
        last = self.total_steps - 1  # the end itself is always due
        interval = max(1.0, self.steps(every)) if every is not None else math.inf
        return math.floor(last / interval + 1e-9) - math.floor(num_steps / interval + 1e-9) + 1

    def epoch(self, num_steps: int) -> float:
        """Epochs that `num_steps` steps make."""
        return num_steps / self.steps_per_epoch


def check_world(batch: BatchConfig, world: int) -> int:
    """The slots of a step. Raises UserError, with a line to paste, for more ranks than these feed."""
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
    return slots


def make_plan(
    batch: BatchConfig, duration: Duration, *, world: int, num_samples: int, tail: Tail = "mask", repeats: int = 1
) -> Plan:
    """The plan of a run. Raises UserError, with a line to paste, for a world or a batch that cannot be."""
    slots = check_world(batch, world)
    if repeats < 1 or slots % repeats:
        legal = ", ".join(str(d) for d in divisors(slots))
        raise UserError(
            f"augment.repeats: {repeats} does not divide the {slots} micro-batches of a step, and copies of a sample "
            f"stand in different ones; legal here: {legal}"
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
        tail=tail,
        repeats=repeats,
    )
    if duration.unit == "%":
        raise UserError(f"duration: {duration.amount:g}% is relative to the run itself; write epochs, steps or samples")
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
