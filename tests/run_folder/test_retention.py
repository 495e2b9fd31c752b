"""Which checkpoints are kept, against the rule said by brute force."""

import itertools

import pytest
from helpers import message
from running import ROOT

from dist_trainer.commands.main import dispatch
from dist_trainer.errors import UserError
from dist_trainer.plan import BatchConfig, Duration, make_plan
from dist_trainer.run_folder.retention import Retention


@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize(("last", "best", "nth"), [(1, 0, 0), (2, 0, 3), (1, 2, 0), (2, 1, 4), (3, 3, 2)])
def test_the_kept_are_those_of_the_rule(last: int, best: int, nth: int, larger: bool) -> None:
    """Every checkpoint that stays has a reason, and every one with a reason stays.

    Mutations: rank without the sign; count an unevaluated one as 0; forget one of the three reasons.
    """
    values = [0.5, None, 0.75, 0.25, 0.75, None, 0.125, 0.625]
    for order in itertools.islice(itertools.permutations(values), 0, None, 997):
        known = {10 * (n + 1): value for n, value in enumerate(order)}
        kept = Retention(
            last=last, best=best, larger_is_better=larger, for_ever=lambda step: bool(nth) and step % (10 * nth) == 0
        ).kept(known)
        for step, value in known.items():
            newer = sum(other > step for other in known)
            better = sum(
                other is not None
                and value is not None
                and ((other > value if larger else other < value) or (other == value and at < step))
                for at, other in known.items()
            )
            reasons = [newer < last, value is not None and better < best, bool(nth) and step // 10 % nth == 0]
            assert (step in kept) == any(reasons), (step, known)


def test_a_checkpoint_has_a_value_only_if_it_was_saved_right_after_its_evaluation() -> None:
    """Mutation: take the scores of an older evaluation."""
    rule = Retention(best=1, metric=("ema", "loss"))
    state = {"step": 20, "evaluated_step": 20, "last": {"model": {"loss": 2.0}, "ema": {"loss": 1.5}}}
    assert rule.value(state) == 1.5
    assert rule.value({**state, "step": 30}) is None
    assert rule.value({**state, "last": {"ema": {"loss": float("nan")}}}) is None
    assert rule.value({**state, "last": {"model": {"loss": 1.0}}}) is None
    assert rule.value({"top1": 0.5}) is None  # of best/


def test_every_nth_counts_what_is_due_and_no_stop_between() -> None:
    """Mutations: count the checkpoints that are there; count from 0."""
    plan = make_plan(BatchConfig(), Duration(100, "step"), world=1, num_samples=2560)
    every = Duration(0.5, "ep")  # 5 steps
    assert [step for step in range(1, 41) if plan.is_nth(step, every, 3)] == [15, 30]
    assert not any(plan.is_nth(step, every, 0) or plan.is_nth(step, None, 1) for step in range(1, 101))


@pytest.mark.parametrize("key", ["checkpoint.best_metric", "averaging.metric"])
def test_a_metric_that_is_not_logged_is_refused_before_there_is_a_folder(key: str) -> None:
    """`plan` refuses it too. Mutation: find it out when the learner is built, after the folder is claimed."""
    config = str(ROOT / "tests" / "fixtures" / "81fd9c4" / "small.yaml")
    with pytest.raises(UserError) as caught:
        dispatch(["plan", config, "--samples=128", "--gpus=1", f"--{key}=val/top2"])
    assert message(caught).startswith(
        f"{key}: 'val/top2' is not logged; did you mean 'val/top5'?; there are val/loss, "
    )
