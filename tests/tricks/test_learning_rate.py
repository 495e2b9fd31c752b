"""The rate of every step, against numbers written by hand and torch's and timm's own schedules."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import message
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from torch.optim import lr_scheduler

from dist_trainer.by_name import Named
from dist_trainer.errors import UserError
from dist_trainer.plan import BatchConfig, Duration, Plan, make_plan
from dist_trainer.tricks.learning_rate import LearningRate, LearningRateConfig, WarmupConfig


def plan_of(world: int = 1, micro_batch: int = 32) -> Plan:
    """5,120 samples in batches of 1,024: 5 steps per epoch; 20 epochs are 100 steps."""
    batch = BatchConfig(global_batch=1024, micro_batch=micro_batch)
    return make_plan(batch, Duration.parse("20ep", "duration"), world=world, num_samples=5120)


def rate_of(plan: Plan | None = None, *, warmup: str = "4ep", start: str = "0", **config: Any) -> LearningRate:
    settings = {"base": 0.1, "warmup": WarmupConfig(duration=warmup, start=start), **config}  # type: ignore[arg-type]
    return LearningRate(LearningRateConfig(**settings), plan or plan_of())


def refused(**config: Any) -> str:
    with pytest.raises(UserError) as caught:
        rate_of(**config)
    return message(caught)


def test_the_rate_at_the_ends_of_warmup_and_run_is_what_a_pencil_says() -> None:
    """base 0.1 x 1024 / 256 = 0.4 after 4 x 5 = 20 steps; half of it midway through 80 steps of cosine.

    The last update is that of step 99: 0.4 x (1 + cos(79/80 pi)) / 2 = 0.00015419276. Fails when the cosine is counted
    from step 0, when it reaches 0 one step early, or when warm-up is a staircase of epochs.
    """
    rate = rate_of()
    by_hand = {0: 0.0, 1: 0.02, 19: 0.38, 20: 0.4, 40: 0.341421356, 60: 0.2, 80: 0.058578644, 99: 0.000154192758}
    assert {step: rate(step) for step in by_hand} == pytest.approx(by_hand, abs=1e-9)


def test_the_base_rate_scales_with_the_global_batch() -> None:
    """A global batch of 4 x 256. Fails when sqrt and linear are exchanged, or `peak` is scaled too."""
    assert rate_of(scale="linear").peak == pytest.approx(0.4)
    assert rate_of(scale="sqrt").peak == pytest.approx(0.2)
    assert rate_of(scale="none").peak == pytest.approx(0.1)
    assert rate_of(base=None, peak=0.7, scale="linear").peak == 0.7


def test_warmup_starts_at_zero_or_at_the_unscaled_rate() -> None:
    """Fails when 'base' starts from the scaled rate, or a run without warm-up begins at 0."""
    assert [rate_of(start="0")(step) for step in (0, 10, 20)] == pytest.approx([0.0, 0.2, 0.4])
    assert [rate_of(start="base")(step) for step in (0, 10, 20)] == pytest.approx([0.1, 0.25, 0.4])
    assert rate_of(warmup="0ep")(0) == pytest.approx(0.4)


def test_the_rate_does_not_depend_on_world_or_accumulation() -> None:
    """Fails when the rate scales with the number of ranks or with the micro-batch."""
    rates = {
        tuple(rate_of(plan_of(world, micro))(step) for step in range(100))
        for world, micro in ((1, 32), (8, 32), (3, 32), (1, 1024), (2, 512))
    }
    assert len(rates) == 1


def test_durations_of_warmup_in_every_unit_are_the_same_steps() -> None:
    """Fails when a percentage is one of an epoch."""
    assert {rate_of(warmup=text).warmup for text in ("4ep", "20step", "20480sample", "20%")} == {20}


@pytest.mark.parametrize("end", [0.0, 0.01])
def test_cosine_is_torchs_cosine_step_for_step(end: float) -> None:
    """Against CosineAnnealingLR over the same 100 steps. Fails when `end` is an absolute rate, or T is off by one."""
    rate = rate_of(warmup="0ep", schedule=Named(name="cosine", args={"end": end}))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate.peak)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=end * rate.peak)
    for step in range(100):
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        peer.step()


def lr_of(peer: Any, optimizer: torch.optim.Optimizer, num_steps: int) -> list[float]:
    """What one of torch's schedulers sets for every step."""
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        peer.step()
    return rates


TORCHS: dict[str, tuple[Named, Any]] = {
    "piecewise": (
        Named(name="piecewise", args={"milestones": ["6ep", "60step", "80%"], "gamma": 0.2}),
        lambda o: lr_scheduler.MultiStepLR(o, [30, 60, 80], gamma=0.2),
    ),
    "polynomial": (
        Named(name="polynomial", args={"power": 0.9}),
        lambda o: lr_scheduler.PolynomialLR(o, total_iters=100, power=0.9),
    ),
    "linear, to an end": (
        Named(name="polynomial", args={"end": 0.1}),
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=100),
    ),
    "exponential": (
        Named(name="exponential", args={"gamma": 0.9, "every": "1step"}),
        lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    ),
    "exponential per two epochs, as stairs": (
        Named(name="exponential", args={"gamma": 0.973, "every": "2ep", "staircase": True}),
        lambda o: lr_scheduler.StepLR(o, 10, gamma=0.973),
    ),
}


@pytest.mark.parametrize("name", TORCHS)
def test_every_schedule_is_torchs_step_for_step(name: str) -> None:
    """Over all 100 steps. Fails when a boundary is late by one, `end` is a rate, or the exponent counts epochs."""
    schedule, peer = TORCHS[name]
    rate = rate_of(warmup="0ep", schedule=schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate.peak)
    assert [rate(step) for step in range(100)] == pytest.approx(lr_of(peer(optimizer), optimizer, 100), rel=1e-9)


TIMMS: dict[str, tuple[Named, str, Any]] = {
    "cosine, counted from the start": (
        Named(name="cosine", args={"end": 0.05}), "start",
        lambda o: CosineLRScheduler(o, t_initial=100, lr_min=0.02, warmup_t=20, warmup_lr_init=0.1, t_in_epochs=False),
    ),
    "cosine, counted from the end of warm-up": (
        Named(name="cosine"), "auto",
        lambda o: CosineLRScheduler(
            o, t_initial=80, warmup_t=20, warmup_lr_init=0.1, warmup_prefix=True, t_in_epochs=False
        ),
    ),
    "polynomial": (
        Named(name="polynomial", args={"power": 2.0}), "auto",
        lambda o: PolyLRScheduler(
            o, t_initial=80, power=2.0, warmup_t=20, warmup_lr_init=0.1, warmup_prefix=True, t_in_epochs=False
        ),
    ),
    "stairs, counted from the start": (
        Named(name="exponential", args={"gamma": 0.5, "every": "5ep", "staircase": True}), "auto",
        lambda o: StepLRScheduler(
            o, decay_t=25, decay_rate=0.5, warmup_t=20, warmup_lr_init=0.1, warmup_prefix=False, t_in_epochs=False
        ),
    ),
    "stairs, counted from the end of warm-up": (
        Named(name="exponential", args={"gamma": 0.5, "every": "5ep", "staircase": True}), "warmup",
        lambda o: StepLRScheduler(o, decay_t=25, decay_rate=0.5, warmup_t=20, warmup_lr_init=0.1, t_in_epochs=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMMS)
def test_warm_up_and_schedule_are_timms_together(name: str) -> None:
    """20 steps from 0.1 to 0.4, then the schedule, on either clock (timm's warmup_prefix). Fails when the rate jumps
    one step early, the schedule is stretched, or `auto` takes the other clock."""
    schedule, count_from, peer = TIMMS[name]
    rate = rate_of(start="base", schedule=schedule, count_from=count_from)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate.peak)
    scheduler = peer(optimizer)
    for step in range(100):
        scheduler.step_update(step)
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12), step


def test_goyals_boundaries_are_epochs_of_the_run_and_paddles_slide() -> None:
    """Batch 1,024, 20 epochs of 5 steps, warm-up 4 epochs, a tenth at epochs 8 and 16: 0.4, 0.04, 0.004.

    From the start these are steps 40 and 80; from the end of warm-up, steps 60 and 100, so the last is refused.
    """
    goyal = rate_of(schedule=Named(name="piecewise", args={"milestones": ["8ep", "16ep"]}))
    corners = {20: 0.4, 39: 0.4, 40: 0.04, 79: 0.04, 80: 0.004, 99: 0.004}
    assert {step: goyal(step) for step in corners} == pytest.approx(corners)
    paddle = rate_of(count_from="warmup", schedule=Named(name="piecewise", args={"milestones": ["8ep"]}))
    assert [paddle(step) for step in (59, 60)] == pytest.approx([0.4, 0.04])
    said = refused(count_from="warmup", schedule=Named(name="piecewise", args={"milestones": ["8ep", "16ep"]}))
    assert said.startswith("lr.schedule.args: piecewise: milestones are steps 40, 80; they must ascend, between 0 and")
    assert "80 steps" in said


def test_the_last_steps_come_near_the_end_and_never_below() -> None:
    """By hand: polynomial to 0.01 of 0.4, one step before its end. Exponential 0.5 per 10 steps, at 0, 5, 10, 99."""
    line = rate_of(warmup="0ep", schedule=Named(name="polynomial", args={"end": 0.01}))
    assert line(99) == pytest.approx(0.4 * (0.01 + 0.99 * 0.01))
    falling = rate_of(warmup="0ep", schedule=Named(name="exponential", args={"gamma": 0.5, "every": "10step"}))
    assert [falling(step) / 0.4 for step in (0, 5, 10, 99)] == pytest.approx([1, 0.5**0.5, 0.5, 0.5**9.9])


def test_stairs_of_parts_of_an_epoch_are_where_they_should_be() -> None:
    """1.36 epochs of 5 steps: the fifth stair is at step 34. Fails when 34 / 6.8 is taken for 4.999..., its floor."""
    args = {"gamma": 0.9, "every": "1.36ep", "staircase": True}
    rate = rate_of(warmup="0ep", schedule=Named(name="exponential", args=args))
    assert [rate(step) / 0.4 for step in (6, 7, 33, 34)] == pytest.approx([1, 0.9, 0.9**4, 0.9**5])


def test_schedules_that_cannot_be_are_refused_by_key() -> None:
    """Fails when a check is dropped: the rate would rise, never fall, or fall where nobody meant it."""

    def said(name: str, **args: Any) -> str:
        return refused(schedule=Named(name=name, args=args))

    for milestones in (["8ep", "6ep"], ["8ep", "8ep"], ["30ep"], ["20ep"], ["0ep"]):
        assert said("piecewise", milestones=milestones).startswith("lr.schedule.args: piecewise: milestones are steps ")
    assert said("piecewise", milestones=[30, 60]).startswith("lr.schedule.args.milestones: 30 is not a duration")
    assert "must be a list such as" in said("piecewise", milestones="8ep")
    assert "must be a list such as" in said("piecewise", milestones=[])
    assert "'milestones'" in said("piecewise", gamma=0.1)
    assert said("piecewise", milestones=["3ep", "8ep"]).startswith(
        "lr.schedule.args.milestones: 3ep lies within the 20"
    )
    for gamma in (0.0, -0.1, 1.5):
        assert f"gamma {gamma} is not in (0, 1]" in said("piecewise", milestones=["8ep"], gamma=gamma)
        assert f"gamma {gamma} is not in (0, 1]" in said("exponential", every="1ep", gamma=gamma)
    assert said("exponential", gamma=0.9, every=2).startswith("lr.schedule.args.every: 2 is not a duration")
    assert "must be positive" in said("exponential", gamma=0.9, every="0ep")
    for end in (-0.1, 1.1):
        assert f"end {end} is not in [0, 1]" in said("cosine", end=end)
        assert f"end {end} is not in [0, 1]" in said("polynomial", end=end)
    assert "power 0 is not positive" in said("polynomial", power=0)
    assert said("cosine", end="low").startswith("lr.schedule.args.end: 'low' is not a number")


def test_a_schedule_of_the_users_gets_durations_as_steps_and_must_give_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`10%` and a list of durations arrive as numbers, other words as they are; a factor below 0 is refused, at once or
    where it occurs. Fails when a user's schedule gets text where a built-in one gets steps."""
    (tmp_path / "my_steps.py").write_text(
        "def late(t, total, *, at, also=(), mode='', below=10**9):\n"
        "    assert at == 10.0 and list(also) == [5.0, 7.0] and mode == 'hard'\n"
        "    return -1.0 if t == below else 1.0 if t < at else 0.5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    args = {"at": "10%", "also": ["1ep", "7168sample"], "mode": "hard"}
    rate = rate_of(schedule=Named(name="my_steps:late", args=args))
    assert [rate(step) for step in (29, 30)] == pytest.approx([0.4, 0.2])
    assert "gives the factor -1.0 at step 20" in refused(
        schedule=Named(name="my_steps:late", args={**args, "below": 0})
    )
    later = rate_of(schedule=Named(name="my_steps:late", args={**args, "below": 3}))
    with pytest.raises(UserError, match="at step 23"):
        later(23)


def test_constant_stays() -> None:
    """Fails when the schedule's factor is applied to warm-up, or warm-up lasts one step longer."""
    rate = rate_of(schedule=Named(name="constant"))
    assert [rate(step) for step in (19, 20, 99)] == pytest.approx([0.38, 0.4, 0.4])


def test_a_schedule_of_the_users_is_called_with_steps_since_warmup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file in the working folder: factor (1 - t / total) ** power over the 80 steps after warm-up.

    Fails when the working folder cannot be imported from, or `t` counts from the start of the run.
    """
    (tmp_path / "my_schedules.py").write_text("def poly(t, total, *, power):\n    return (1 - t / total) ** power\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rate = rate_of(schedule=Named(name="my_schedules:poly", args={"power": 2}))
    assert [rate(step) for step in (20, 60, 99)] == pytest.approx([0.4, 0.1, 0.4 / 6400])
    assert "it accepts power" in refused(schedule=Named(name="my_schedules:poly", args={"pwoer": 2}))


def test_rates_that_cannot_be_are_refused_by_key() -> None:
    """Fails when a check is dropped: the run would start with no rate, with infinity, or never leave warm-up."""
    assert "neither is set" in refused(base=None)
    assert "both are set" in refused(peak=0.1)
    for bad in (-0.1, 0.0, math.inf, math.nan):
        assert refused(base=bad).startswith("lr: ")
    assert refused(base=None, peak=0.4, start="base").startswith("lr.warmup.start: ")
    assert refused(warmup="20ep").startswith("lr.warmup.duration: 20ep is 100 steps")
    assert refused(warmup="often").startswith("lr.warmup.duration: 'often'")


def test_schedules_that_do_not_exist_are_refused_with_the_nearest_name() -> None:
    """Fails when an import error or an attribute error gets through."""
    assert refused(schedule=Named(name="cosin")).startswith("lr.schedule.name: 'cosin' is not a built-in schedule")
    assert "did you mean 'cosine'?" in refused(schedule=Named(name="cosin"))
    assert "cannot import 'no_such_module'" in refused(schedule=Named(name="no_such_module:f"))
    assert "did you mean 'cos'?" in refused(schedule=Named(name="math:coss"))
    assert "did you mean 'end'?; it accepts end" in refused(schedule=Named(name="cosine", args={"ende": 0.1}))
