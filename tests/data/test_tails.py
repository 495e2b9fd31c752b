"""Which samples a step holds at the end of an epoch, and with repeated augmentation: counted, not derived."""

from collections import Counter

import helpers  # noqa: F401  (hypothesis without a deadline)
import pytest
from helpers import message
from hypothesis import given
from hypothesis import strategies as st

from dist_trainer.errors import UserError
from dist_trainer.plan import BatchConfig, Duration, Plan, Tail, make_plan

TAILS: list[Tail] = ["mask", "carry", "drop"]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Up to 12 slots of up to 6 samples, sets of one to four global batches, repeats that divide the slots."""
    slots, micro = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    repeats = draw(st.sampled_from([k for k in range(1, slots + 1) if slots % k == 0]))
    batch = BatchConfig(global_batch=slots * micro, micro_batch=micro)
    num_samples = draw(st.integers(slots * micro, 4 * slots * micro))
    tail = draw(st.sampled_from(TAILS))
    return make_plan(batch, Duration(4, "ep"), world=1, num_samples=num_samples, tail=tail, repeats=repeats)


Place = tuple[int, int]


def places(plan: Plan, step: int, slot: int) -> list[tuple[Place, bool]]:
    """((epoch, position), whether it counts) of the samples of a slot."""
    spans = plan.spans(step, slot)
    assert len(spans) <= 2
    return [((span.epoch, p), span.counts) for span in spans for p in range(span.start, span.stop)]


@given(plans())
def test_every_slot_is_full_and_every_copy_of_a_step_holds_the_same_samples(plan: Plan) -> None:
    """m places in each slot; the slots of copy c hold, in order, what those of copy 0 hold.

    Fails when copies of a sample stand in one slot, or the last slot of an epoch is short.
    """
    per_copy = plan.num_slots // plan.repeats
    for step in range(plan.total_steps):
        slots = [places(plan, step, slot) for slot in range(plan.num_slots)]
        assert all(len(slot) == plan.micro_batch for slot in slots)
        for slot, held in enumerate(slots):
            assert plan.copy_of(slot) == slot // per_copy
            assert held == slots[slot % per_copy]


@given(plans())
def test_what_counts_is_what_the_tail_promises(plan: Plan) -> None:
    """mask: every position of each epoch once. carry: the same, and no step is short. drop: whole steps alone.

    Each counts once per copy; num_valid is the number that count; position is the number seen so far.
    Fails when the filling counts, carry leaves out a sample where two epochs meet, or num_valid forgets the copies.
    """
    seen: Counter[Place] = Counter()
    for step in range(plan.total_steps):
        counted = [place for slot in range(plan.num_slots) for place, counts in places(plan, step, slot) if counts]
        assert len(counted) == plan.num_valid(step)
        seen.update(counted)
        assert plan.position(step + 1) == len(seen) or plan.tail == "mask"
    size = plan.num_samples // plan.repeats
    per_step = plan.global_batch // plan.repeats
    if plan.tail == "carry":
        order = sorted(seen)
        assert order == [divmod(p, size) for p in range(len(order))]
        assert len(order) == plan.total_steps * per_step
        assert 4 * size <= len(order) < 4 * size + per_step
    else:
        length = size if plan.tail == "mask" else size // per_step * per_step
        assert set(seen) == {(epoch, p) for epoch in range(4) for p in range(length)}
        assert plan.position(plan.total_steps) == len(seen)
    assert set(seen.values()) == {plan.repeats}


@given(plans())
def test_filling_is_valid_samples_of_the_same_epoch(plan: Plan) -> None:
    """Weight-0 places hold positions that exist, so that batch-norm sees real pixels. Fails without the wrap."""
    for step in range(plan.total_steps):
        for slot in range(plan.num_slots):
            for (epoch, position), counts in places(plan, step, slot):
                assert 0 <= position < plan.samples_per_epoch
                assert counts or epoch == int(step // plan.steps_per_epoch)


def test_repeats_that_do_not_divide_the_slots_are_refused_with_those_that_do() -> None:
    """Fails when copies of one sample would share a slot."""
    with pytest.raises(UserError) as caught:
        make_plan(BatchConfig(global_batch=64, micro_batch=8), Duration(1, "ep"), world=1, num_samples=100, repeats=3)
    text = message(caught)
    assert text.startswith("augment.repeats: 3 does not divide the 8 micro-batches")
    assert text.endswith("legal here: 1, 2, 4, 8")
