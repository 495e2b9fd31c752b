"""Which copy of a run is ahead, by hand: A, B, C are starts, at the steps behind them."""

import pytest

from dist_trainer.run_folder.lineage import Begin, Copy, ahead, common

A, B, C = Begin("a", 0), Begin("b", 80), Begin("c", 100)


@pytest.mark.parametrize(
    ("ours", "our_step", "theirs", "their_step", "expected"),
    [
        ([A], 100, [A], 80, "ours"),  # the mirror lags behind
        ([A], 80, [A], 100, "theirs"),  # the newest one here is damaged
        ([A], 100, [A], 100, "ours"),
        ([], 0, [A], 80, "theirs"),  # nothing here
        ([A], 60, [A, B], 120, "theirs"),  # the run went on elsewhere
        ([A], 100, [A, B], 120, "theirs"),  # it made 80 to 100 again, and is further
        ([A], 100, [A, B], 80, "ours"),  # it was started elsewhere and made nothing
        ([A], 100, [A, B], 90, None),  # both have training of their own, and the larger step lacks the later start
        ([A, B], 120, [A], 80, "ours"),  # the same, seen from the other side
        ([A, B], 90, [A], 100, None),
        ([A, B], 80, [A], 100, "theirs"),
        ([A, B], 90, [A, C], 120, None),  # two hosts went on at once
        ([A, B], 80, [A, C], 120, "theirs"),
        ([A, B], 90, [A, C], 100, "ours"),
        ([Begin("x", 0)], 10, [Begin("y", 0)], 20, None),  # two runs of one name
        ([Begin("x", 0)], 0, [Begin("y", 0)], 20, "theirs"),
        ([], 10, [A], 20, "theirs"),  # a folder of a version without lineage.json: the larger step
        ([], 30, [A], 20, None),
    ],
)
def test_the_copy_that_is_ahead_goes_on(
    ours: list[Begin], our_step: int, theirs: list[Begin], their_step: int, expected: Copy | None
) -> None:
    """Nobody's training is lost in silence; and what one says, the other says. Mutations: decide by steps alone; by the
    number of starts alone."""
    assert ahead(ours, our_step, theirs, their_step) == expected
    other: dict[Copy | None, Copy | None] = {"ours": "theirs", "theirs": "ours", None: None}
    if (ours, our_step) != (theirs, their_step):
        assert ahead(theirs, their_step, ours, our_step) == other[expected]


def test_starts_in_common_are_those_before_the_first_that_differs() -> None:
    assert common([A, B], [A, C]) == common([A], [A, B]) == 1
    assert common([], [A]) == common([B], [A, B]) == 0
