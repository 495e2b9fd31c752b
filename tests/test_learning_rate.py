"""The rate of every step, against numbers written by hand and torch's own schedule."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import message

from dist_trainer.errors import UserError
from dist_trainer.named import Named
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
    assert "it accepts t, total, power" in refused(schedule=Named(name="my_schedules:poly", args={"pwoer": 2}))


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
    assert "it accepts t, total, end" in refused(schedule=Named(name="cosine", args={"ende": 0.1}))
