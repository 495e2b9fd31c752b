"""The arithmetic of slots, steps and durations, against brute force and numbers written by hand."""

import math
import re
from dataclasses import replace
from fractions import Fraction

import pytest
from helpers import message
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dist_trainer.errors import UserError
from dist_trainer.plan import BatchConfig, Duration, Plan, largest_world, make_plan

ONE_EPOCH = Duration(1.0, "ep")


def plan_of(micro: int, slots: int, world: int, num_samples: int | None = None, duration: str = "1ep") -> Plan:
    batch = BatchConfig(global_batch=micro * slots, micro_batch=micro)
    num_samples = micro * slots if num_samples is None else num_samples
    return make_plan(batch, Duration.parse(duration, "duration"), world=world, num_samples=num_samples)


def refusal(batch: BatchConfig, world: int, num_samples: int, duration: Duration = ONE_EPOCH) -> str:
    with pytest.raises(UserError) as caught:
        make_plan(batch, duration, world=world, num_samples=num_samples)
    return message(caught)


def pasted(text: str, batch: BatchConfig, world: int) -> tuple[BatchConfig, int]:
    """Batch and world after what stands behind "Paste: " (up to an alternative) was typed."""
    line = text.partition("Paste: ")[2].partition(";")[0]
    changes = {key: int(value) for key, value in re.findall(r"--batch\.(\w+) (\d+)", line)}
    worlds = [int(value) for value in re.findall(r"--nproc-per-node (\d+)", line)]
    assert changes or worlds, f"nothing to paste in {text!r}"
    return replace(batch, **changes), *(worlds or [world])


@given(st.integers(1, 16), st.integers(1, 200), st.data())
def test_ranks_own_consecutive_slots_that_partition_the_step(micro: int, slots: int, data: st.DataObject) -> None:
    """Rank by rank, the slots are 0, 1, ..., M-1, shared out evenly to within one.

    Fails when slots_of rounds both ends up, or gives every rank M // W slots.
    """
    world = data.draw(st.integers(1, slots))
    plan = plan_of(micro, slots, world)
    owned = [list(plan.slots_of(rank)) for rank in range(world)]
    assert [slot for slots_of_rank in owned for slot in slots_of_rank] == list(range(slots))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@given(st.integers(1, 200), st.data())
def test_forwards_are_those_of_the_busiest_rank_and_efficiency_is_the_share_that_counts(
    slots: int, data: st.DataObject
) -> None:
    """forwards = ceil(M / W) = what the busiest rank owns; efficiency = slots / forwards of all ranks.

    Fails when forwards rounds down, or efficiency leaves the ghosts out.
    """
    world = data.draw(st.integers(1, slots))
    plan = plan_of(2, slots, world)
    busiest = max(len(plan.slots_of(rank)) for rank in range(world))
    assert plan.forwards == math.ceil(Fraction(slots, world)) == busiest
    assert plan.efficiency == slots / sum(busiest for _ in range(world))


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 300))
def test_the_valid_samples_of_an_epoch_sum_to_the_training_set(micro: int, slots: int, more: int) -> None:
    """num_valid(step) counts the epoch's positions that fall into the step, in every epoch alike.

    Fails when the last step counts the whole global batch, or steps_per_epoch rounds down.
    """
    num_samples = micro * slots + more
    plan = plan_of(micro, slots, 1, num_samples, "3ep")
    steps = [position // plan.global_batch for position in range(num_samples)]
    assert plan.steps_per_epoch == max(steps) + 1
    assert plan.total_steps == 3 * plan.steps_per_epoch
    for step in range(plan.total_steps):
        assert plan.num_valid(step) == steps.count(step % plan.steps_per_epoch)


@given(st.integers(1, 512))
def test_the_chunk_is_the_largest_divisor_of_the_micro_batch_up_to_eight(micro: int) -> None:
    """Fails when the chunk is min(8, micro_batch), which need not divide."""
    assert plan_of(micro, 2, 1).chunk == max(d for d in range(1, 9) if micro % d == 0)


@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_a_micro_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(
    global_batch: int, micro: int, data: st.DataObject
) -> None:
    """The message names the nearest legal values on either side, and the pasted line makes a plan on the same ranks.

    Fails when divisors() forgets the upper half, or when the pasted micro-batch leaves ranks without a slot.
    """
    assume(global_batch % micro)
    world = data.draw(st.integers(1, global_batch))
    batch = BatchConfig(global_batch=global_batch, micro_batch=micro)
    text = refusal(batch, world, num_samples=10_000)
    assert text.startswith("batch.micro_batch: ")

    def named(what: str) -> set[int]:
        return {int(n) for n in re.search(rf"nearest {what}: ([\d or]+)", text)[1].split(" or ")}

    def around(value: int, legal: list[int]) -> set[int]:
        return {*[v for v in legal if v < value][-1:], *[v for v in legal if v > value][:1]}

    assert named("micro-batches") == around(micro, [d for d in range(1, global_batch + 1) if global_batch % d == 0])
    assert named("global batches") == around(global_batch, [micro * k for k in range(1, 302)])
    batch, world = pasted(text, batch, world)
    make_plan(batch, ONE_EPOCH, world=world, num_samples=10_000)


@given(st.integers(1, 32), st.integers(1, 32), st.integers(1, 64))
def test_more_ranks_than_slots_are_refused_with_a_smaller_world_and_a_smaller_micro_batch(
    micro: int, slots: int, more: int
) -> None:
    """Both lines make a legal plan: the largest world for this batch, and the largest micro-batch for this world.

    Fails when W > M is let through, or the micro-batch offered is the smallest that works.
    """
    batch, world = BatchConfig(global_batch=micro * slots, micro_batch=micro), slots + more
    text = refusal(batch, world, num_samples=10_000)
    assert f"{more} ranks would idle" in text
    smaller_batch, smaller_world = pasted(text, batch, world)
    assert (smaller_batch, smaller_world) == (batch, slots)
    make_plan(batch, ONE_EPOCH, world=slots, num_samples=10_000)
    legal = [d for d in range(1, micro + 1) if micro * slots % d == 0 and micro * slots // d >= world]
    offered = [int(value) for value in re.findall(r"or --batch\.micro_batch (\d+)", text)]
    assert offered == legal[-1:]
    for value in offered:
        make_plan(replace(batch, micro_batch=value), ONE_EPOCH, world=world, num_samples=10_000)


@given(st.integers(1, 16), st.integers(2, 16), st.data())
def test_a_training_set_smaller_than_the_global_batch_is_refused_with_a_batch_that_fits(
    micro: int, slots: int, data: st.DataObject
) -> None:
    """The pasted line makes a legal plan for these samples on these ranks.

    Fails when the offered global batch is rounded up, or is too small to feed the ranks.
    """
    num_samples = data.draw(st.integers(1, micro * slots - 1))
    world = data.draw(st.integers(1, min(slots, num_samples)))
    batch = BatchConfig(global_batch=micro * slots, micro_batch=micro)
    text = refusal(batch, world, num_samples)
    assert f"{num_samples} samples" in text
    batch, world = pasted(text, batch, world)
    make_plan(batch, ONE_EPOCH, world=world, num_samples=num_samples)


def test_batches_worlds_and_training_sets_that_cannot_be_are_refused_by_name() -> None:
    """Fails when a zero reaches a division, or a negative number a range."""
    assert refusal(BatchConfig(global_batch=0), 1, 100).startswith("batch.global_batch: 0 ")
    assert refusal(BatchConfig(micro_batch=-4), 1, 100).startswith("batch.micro_batch: -4 ")
    assert "world of 0 ranks" in refusal(BatchConfig(), 0, 1000)
    assert "fewer than batch.micro_batch 32" in refusal(BatchConfig(), 1, 31)


@pytest.mark.parametrize("text", ["90", "ep", "", "-1ep", "1e3step", "5 parsecs", "1,5ep", "infep", "3ep 2step"])
def test_what_is_no_duration_is_refused_under_the_name_of_its_key(text: str) -> None:
    """Fails when the pattern is searched for instead of matched in full."""
    with pytest.raises(UserError) as caught:
        Duration.parse(text, "eval.every")
    assert message(caught).startswith(f"eval.every: {text!r} ")


def test_a_run_of_no_step_or_of_a_share_of_itself_is_refused() -> None:
    """Fails when a duration of zero makes a plan of zero steps."""
    for amount, unit in ((0.0, "ep"), (0.0, "step"), (0.0, "sample"), (5.0, "%")):
        assert refusal(BatchConfig(), 1, 1000, Duration(amount, unit)).startswith("duration: ")


def test_durations_convert() -> None:
    """By hand: 60,000 samples in batches of 256 are 235 steps per epoch; 8 epochs are 1,880.

    Fails when an epoch counts 60,000 / 256 = 234.375 steps, or a percentage is one of an epoch.
    """
    plan = plan_of(128, 2, 1, 60_000, "8ep")
    assert (plan.steps_per_epoch, plan.total_steps) == (235, 1880)
    hand = {
        "2ep": 470,
        "0.5ep": 117.5,
        "500step": 500,
        "128000sample": 500,
        "64samples": 0.25,
        "5%": 94,
        " 3 eps ": 705,
    }
    assert {text: plan.steps(Duration.parse(text, "x")) for text in hand} == pytest.approx(hand, rel=1e-12)
    assert plan.epoch(470) == 2.0
    assert plan_of(128, 2, 1, 60_000, "0.5ep").total_steps == 118  # no part of the run is lost
    assert plan_of(128, 2, 1, 60_000, "256000sample").total_steps == 1000


@given(
    steps_per_epoch=st.integers(1, 40),
    interval=st.fractions(min_value=Fraction(1, 12), max_value=5, max_denominator=12),
    epochs=st.integers(1, 6),
)
@example(steps_per_epoch=7, interval=Fraction(1, 5), epochs=2)  # 7 / (0.2 * 7) is just below 5
def test_what_is_due_every_so_often_happens_once_per_interval_and_at_the_end(
    steps_per_epoch: int, interval: Fraction, epochs: int
) -> None:
    """The k-th time is the first whole step at or after k intervals, in exact arithmetic; an interval is >= 1 step.

    Fails without the small term in `due`, or when the end is left out.
    """
    plan = plan_of(1, 1, 1, steps_per_epoch, f"{epochs}ep")
    exact = max(Fraction(1), interval * steps_per_epoch)
    expected = {math.ceil(k * exact) for k in range(1, plan.total_steps + 1)} | {plan.total_steps}
    every = Duration(float(interval), "ep")
    fired = [step for step in range(1, plan.total_steps + 1) if plan.due(step, every)]
    assert fired == sorted(step for step in expected if step <= plan.total_steps)


def test_what_has_no_interval_is_due_at_the_end_alone() -> None:
    """Fails when None means never, or always."""
    plan = plan_of(1, 1, 1, 10, "2ep")
    assert [step for step in range(1, 21) if plan.due(step, None)] == [20]


def test_the_largest_world_is_bounded_by_slots_and_by_devices() -> None:
    """Fails when either bound is dropped."""
    batch = BatchConfig(global_batch=256, micro_batch=32)
    assert [largest_world(batch, devices) for devices in (0, 1, 7, 8, 9)] == [1, 1, 7, 8, 8]
