"""Weight averaging: mean and greedy soup against exact arithmetic, and brute force.

Every test was seen to fail under the mutation that it names.
"""

import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import message
from hypothesis import example, given
from hypothesis import strategies as st
from kept_snapshots import bit_equal

from dist_trainer.errors import UserError
from dist_trainer.tensors import State
from dist_trainer.tricks.averaging import (
    AveragingConfig,
    Member,
    average,
    chosen_metric,
    larger_is_better,
)


def mean(members: Iterable[Member]) -> State:
    return average(members)[0]


def greedy_soup(members: Iterable[Member], score: Callable[[State], float]) -> tuple[State, list[str]]:
    return average(members, lambda name, state: score(state))


BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def any_floats(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Finite ones, drawn as bit patterns: every exponent, subnormal ones, both zeros, the largest."""
    info = torch.iinfo(BITS[dtype])
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(info.min, info.max + 1, (count,), generator=generator, dtype=torch.int64)
    values = patterns.to(BITS[dtype]).view(dtype)
    limits = torch.finfo(dtype)
    edges = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, limits.smallest_normal], dtype=dtype)
    smallest = torch.tensor([1], dtype=BITS[dtype]).view(dtype)
    return torch.cat([edges, smallest, values[values.isfinite()]])


# The mean


def test_the_mean_of_copies_of_a_model_is_that_model_bit_for_bit() -> None:
    """Of 1 to 100 copies, in float32, bfloat16 and float16, for thousands of bit patterns of every size.

    Fails when the sum is float32 or starts from 0 (which loses -0.0), and when a float32 1/k is multiplied with.
    """
    model = {str(dtype): any_floats(3000, dtype, seed) for seed, dtype in enumerate(BITS)}
    for num in range(1, 101):
        assert bit_equal(mean((f"copy {n}", model) for n in range(num)), model), num


@given(st.integers(1, 100), st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@example(num=3, values=[0.1, -0.0, 1e-45, 3.4028234663852886e38])
def test_the_mean_of_copies_of_any_float32_is_that_float32(num: int, values: list[float]) -> None:
    """Fails like the one above."""
    model = {"w": torch.tensor(values)}
    assert bit_equal(mean([("copy", model)] * num), model)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
@example([1e8, 1.0, -1e8])
@example([1.0, 2.0**-40, -1.0])
def test_the_mean_is_that_of_exact_arithmetic(values: list[float]) -> None:
    """To half a unit of float32, the rounding of the result, and one of float64 per addition.

    Fails when the sum is float32 (1e8 + 1 - 1e8 is 0), when a member is left out, or with another divisor.
    """
    result = mean((f"{n}", {"w": torch.tensor([value])}) for n, value in enumerate(values))["w"]
    assert result.dtype == torch.float32
    exact = sum(map(Fraction, values), Fraction()) / len(values)
    size = sum(abs(Fraction(value)) for value in values)
    half_a_unit = Fraction(float(np.spacing(np.float32(abs(float(exact)))))) / 2
    assert abs(Fraction(result.item()) - exact) <= half_a_unit * Fraction(1001, 1000) + size / 2**52


def test_the_mean_in_bfloat16_is_rounded_once() -> None:
    """256, 1 and 1: their mean is 86. In bfloat16, 256 + 1 is 256, and a third of it 85.5.

    Fails when bfloat16 is summed in its own type, or the result is not cast back.
    """
    values = torch.tensor([256.0, 1.0, 1.0]).bfloat16()
    result = mean((str(n), {"w": value}) for n, value in enumerate(values))["w"]
    assert result.dtype == torch.bfloat16
    assert result.item() == 86.0


def test_what_is_no_float_comes_from_the_best() -> None:
    """A batch-norm counter stays an integer, and it is that of the first file.

    Fails when integers are averaged (5 and 8: 6.5), or taken from the last.
    """
    first = {"n": torch.tensor(5), "mask": torch.tensor([True, False]), "w": torch.tensor([1.0])}
    second = {"n": torch.tensor(8), "mask": torch.tensor([False, False]), "w": torch.tensor([2.0])}
    expected = {"n": torch.tensor(5), "mask": torch.tensor([True, False]), "w": torch.tensor([1.5])}
    assert bit_equal(mean([("a", first), ("b", second)]), expected)


def test_the_mean_leaves_its_inputs_alone() -> None:
    """Float64 included, which needs no conversion. Fails when the sum is made in the first state's memory."""
    states = [{"w": torch.tensor([x], dtype=torch.float64), "n": torch.tensor([7])} for x in (1.0, 2.0)]
    result = mean(("x", state) for state in states)
    result["n"] += 1
    result["w"] += 1
    assert [state["w"].item() for state in states] == [1.0, 2.0]
    assert states[0]["n"].item() == 7


def test_a_score_may_do_what_it_likes_with_the_model_that_it_is_given() -> None:
    """PreciseBN and counters write into it. Fails when the sum lends out its integers."""

    def score(state: State) -> float:
        for value in state.values():
            value.fill_(9)
        return 0.0

    soup, _ = greedy_soup([(name, {"w": torch.ones(1), "n": torch.tensor(7)}) for name in "ab"], score)
    assert bit_equal(soup, {"w": torch.ones(1), "n": torch.tensor(7)})


def live(num: int) -> tuple[Iterator[Member], list[int]]:
    """`num` members made one by one, and how many of the earlier ones were alive at each making."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def one(n: int) -> State:
        alive.append(sum(each() is not None for each in made))
        state = {"w": torch.full((5,), float(n)), "n": torch.tensor(n)}
        made.extend(map(weakref.ref, state.values()))
        return state

    return ((str(n), one(n)) for n in range(num)), alive


def test_one_member_is_held_at_a_time() -> None:
    """In the greedy soup too. Fails when members are listed first, or one, or its integers, is held beside the next."""
    members, alive = live(4)
    mean(members)
    assert alive == [0, 0, 0, 0]
    members, alive = live(4)
    greedy_soup(members, lambda _: 0.0)
    assert alive == [0, 0, 0, 0]


BASE = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        ({"w": torch.zeros(2, 3)}, ["missing: b"]),
        ({**BASE, "c": torch.zeros(1)}, ["unexpected: c"]),
        ({**BASE, "w": torch.zeros(3, 2)}, ["w float32 (3, 2) for float32 (2, 3)"]),
        ({**BASE, "b": torch.zeros(3).bfloat16()}, ["b bfloat16 (3,) for float32 (3,)"]),
        ({"w": torch.zeros(1), "x": torch.zeros(1)}, ["missing: b", "unexpected: x", "w float32 (1,)"]),
    ],
)
def test_models_that_do_not_match_are_refused_by_file_and_tensor(other: State, parts: list[str]) -> None:
    """A shape that broadcasts, or another type, would pass in silence.

    Fails when types or shapes are not compared, or only the keys of the first are looked at.
    """
    with pytest.raises(UserError) as caught:
        mean([("best.safetensors", BASE), ("other.safetensors", other)])
    assert message(caught).startswith("other.safetensors: cannot be averaged with best.safetensors")
    for part in parts:
        assert part in message(caught)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_refused_by_file_and_tensor(value: float, place: int) -> None:
    """Fails when only NaN is looked for, or the first file is not looked at."""
    states = [{"a": torch.zeros(2), "b": torch.zeros(2)} for _ in range(2)]
    states[place]["b"][1] = value
    with pytest.raises(UserError) as caught:
        mean((f"file{n}", state) for n, state in enumerate(states))
    assert message(caught).startswith(f"file{place}: b has values that are not finite")


def test_nothing_to_average_is_said() -> None:
    """Fails when an empty mean is an empty model, or ZeroDivisionError gets through."""
    for call in (lambda: mean([]), lambda: greedy_soup([], lambda _: 0.0)):
        with pytest.raises(UserError) as caught:
            call()
        assert "nothing to average" in message(caught)


# The greedy soup


def brute_force(values: list[int], score: Callable[[float], float]) -> tuple[int, ...]:
    """The one subset whose every choice is right: a member is in it exactly if it does not lower those before it."""

    def of(indices: tuple[int, ...]) -> float:
        return score(float(np.float32(sum(values[n] for n in indices) / len(indices))))

    def right(subset: tuple[int, ...]) -> bool:
        before = [tuple(m for m in subset if m < n) for n in range(len(values))]
        return all((n in subset) == (not b or of((*b, n)) >= of(b)) for n, b in enumerate(before))

    subsets = [s for size in range(len(values)) for s in itertools.combinations(range(len(values)), size + 1)]
    (only,) = filter(right, subsets)
    return only


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=7), st.integers(-2, 2))
@example([1, 1, -3, 3], 0)
def test_the_greedy_soup_is_that_of_brute_force(values: list[int], target: int) -> None:
    """Over all subsets, for the score -|mean - target|; of small integers, since equal scores keep a member.

    Fails with > for >=, when a trial that is refused stays in the sum, when it is compared with the first alone or with
    the score of the trial before, and when the result is the mean of all.
    """

    def score(value: float) -> float:
        return -abs(value - target)

    members = [(str(n), {"w": torch.tensor(float(value))}) for n, value in enumerate(values)]
    soup, kept = greedy_soup(iter(members), lambda state: score(state["w"].item()))
    expected = brute_force(values, score)
    assert kept == [str(n) for n in expected]
    assert bit_equal(soup, mean(members[n] for n in expected))


def test_a_score_that_is_no_number_keeps_no_member_but_the_first() -> None:
    """Fails when a member is refused only for a score that is smaller."""
    scores = iter([0.5, math.nan, 0.6])
    _, kept = greedy_soup([(name, {"w": torch.ones(1)}) for name in "abc"], lambda _: next(scores))
    assert kept == ["a", "c"]


# The config


def test_the_metric_is_chosen_from_what_is_logged() -> None:
    """Fails when auto prefers the model to its EMA, a misspelt name passes, or a loss counts as an accuracy."""
    plain = ["val/top1", "val/top5", "val/loss"]
    both = [*plain, "val_ema/top1", "val_ema/top5", "val_ema/loss"]
    assert chosen_metric(AveragingConfig(), plain) == "val/top1"
    assert chosen_metric(AveragingConfig(), both) == "val_ema/top1"
    assert chosen_metric(AveragingConfig(metric="val/loss"), both) == "val/loss"
    for config, parts in (
        (AveragingConfig(metric="val/top"), ["averaging.metric: 'val/top'", "did you mean 'val/top"]),
        (AveragingConfig(metric="val_ema/top1"), ["'val_ema/top1' is not logged", "val/loss, val/top1, val/top5"]),
        (AveragingConfig(top_k=-1), ["averaging.top_k: -1"]),
    ):
        with pytest.raises(UserError) as caught:
            chosen_metric(config, plain)
        for part in parts:
            assert part in message(caught)
    assert [name for name in both if not larger_is_better(name)] == ["val/loss", "val_ema/loss"]
