"""Running statistics of batch-norm against NumPy's float64 on the same micro-batches."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import message
from timm.layers import BatchNormAct2d
from torch import nn

from dist_trainer.errors import UserError
from dist_trainer.tricks.batch_norm import RunningStatistics

NUM_SLOTS, NUM_STEPS, SIZE, CHANNELS = 3, 2, 5, 4

LAYERS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(CHANNELS),
    "BatchNorm2d": lambda: nn.BatchNorm2d(CHANNELS, momentum=0.3),
    "timm's BatchNormAct2d": lambda: BatchNormAct2d(CHANNELS),
}


def micro_batches(dimensions: int, seed: int = 0) -> torch.Tensor:
    """float32 [steps, slots, m, C] or [steps, slots, m, C, 3, 2], channels with different mean and spread."""
    shape = (NUM_STEPS, NUM_SLOTS, SIZE, CHANNELS) + ((3, 2) if dimensions == 4 else ())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scale = torch.tensor([1.0, 2.0, 0.5, 10.0]).reshape(-1, *([1] * (dimensions - 2)))
    return x * scale + scale.flip(0)


def run_steps(model: nn.Module, statistics: RunningStatistics, x: torch.Tensor) -> None:
    for step in x:
        for slot in step:
            model(slot)
            statistics.add()
        statistics.update(statistics.take(), NUM_SLOTS)


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_moves_running_statistics_by_the_mean_over_its_micro_batches(name: str) -> None:
    """running <- (1 - mu) running + mu x mean over slots of (mean, unbiased variance), in NumPy, from any start.

    Fails when each micro-batch moves the average by itself, when the variance is biased, or mu is not the layer's own.
    """
    layer: Any = LAYERS[name]()
    x = micro_batches(2 if name == "BatchNorm1d" else 4)
    layer.running_mean.copy_(torch.tensor([1.0, -1.0, 0.0, 5.0]))
    layer.running_var.copy_(torch.tensor([1.0, 4.0, 0.1, 50.0]))
    mean, variance = layer.running_mean.double().numpy().copy(), layer.running_var.double().numpy().copy()
    mu = layer.momentum
    statistics = RunningStatistics(layer)
    run_steps(layer, statistics, x)
    statistics.publish()
    axes = (0, 2, 3)[: x.dim() - 3] if x.dim() > 4 else (0,)
    for step in x.double().numpy():
        mean = (1 - mu) * mean + mu * np.mean([slot.mean(axes) for slot in step], axis=0)
        variance = (1 - mu) * variance + mu * np.mean([slot.var(axes, ddof=1) for slot in step], axis=0)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(layer.running_var.numpy(), variance, rtol=1e-5)
    assert layer.num_batches_tracked == NUM_STEPS


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)
    )


def test_ranks_that_share_the_micro_batches_arrive_at_the_same_statistics() -> None:
    """One rank with three slots, and two ranks with two and one whose sums are added: equal to float32 rounding.

    Fails when each rank divides by its own number of micro-batches.
    """
    alone, first, second = (small_net() for _ in range(3))
    whole, parts = RunningStatistics(alone), [RunningStatistics(first), RunningStatistics(second)]
    x = micro_batches(4)
    run_steps(alone, whole, x)
    for step in x:
        for slot, (model, statistics) in zip(step, [(first, parts[0])] * 2 + [(second, parts[1])], strict=True):
            model(slot)
            statistics.add()
        total = parts[0].take() + parts[1].take()
        for statistics in parts:
            statistics.update(total.clone(), NUM_SLOTS)
    assert torch.equal(parts[0].running, parts[1].running)
    torch.testing.assert_close(parts[0].running, whole.running)


def test_publishing_changes_nothing_in_training() -> None:
    """Bit for bit the same outputs and statistics, whether or not every micro-batch is followed by `publish`.

    Fails when the layers keep a momentum below 1, so that what was published leaks into the next micro-batch.
    """
    quiet = small_net()
    loud = copy.deepcopy(quiet)
    quiet_statistics, loud_statistics = RunningStatistics(quiet), RunningStatistics(loud)
    for step in micro_batches(4):
        for slot in step:
            assert torch.equal(quiet(slot), loud(slot))
            quiet_statistics.add()
            loud_statistics.add()
            loud_statistics.publish()
        for statistics in (quiet_statistics, loud_statistics):
            statistics.update(statistics.take(), NUM_SLOTS)
    assert torch.equal(quiet_statistics.running, loud_statistics.running)


def test_published_statistics_are_what_evaluation_and_state_dict_see() -> None:
    """Fails when the layers' buffers are replaced by `publish`, so that a state dict holds the last micro-batch."""
    model = small_net()
    statistics = RunningStatistics(model)
    run_steps(model, statistics, micro_batches(4))
    statistics.publish()
    fresh = small_net()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        torch.cat([fresh[i].get_buffer(f"running_{what}") for i in (1, 4) for what in ("mean", "var")]),
        statistics.running,
        rtol=0,
        atol=0,
    )
    x = micro_batches(4)[0, 0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_statistics_continue_from_those_that_were_loaded() -> None:
    """One step, saved and loaded into another model, and one more step are two steps, bit for bit.

    Fails when the running statistics begin at 0 and 1 whatever the buffers hold, or the count of updates is lost.
    """
    x = micro_batches(4)
    whole, first, second = (small_net() for _ in range(3))
    through = RunningStatistics(whole)
    run_steps(whole, through, x)
    half = RunningStatistics(first)
    run_steps(first, half, x[:1])
    half.publish()
    second.load_state_dict(first.state_dict())
    resumed = RunningStatistics(second)
    run_steps(second, resumed, x[1:])
    assert torch.equal(resumed.running, through.running)
    resumed.publish()
    assert second[1].num_batches_tracked == NUM_STEPS


def test_frozen_layers_keep_their_statistics_bit_for_bit() -> None:
    """A layer in evaluation mode inside a model that trains, over 1,000 micro-batches per step.

    Fails when its statistics, counted 1,000 times, are summed in float32.
    """
    model = small_net()
    frozen: Any = model[1]
    frozen.eval()
    frozen.running_mean.uniform_(-1, 1)
    frozen.running_var.uniform_(0.1, 3)
    before = torch.cat([frozen.running_mean, frozen.running_var]).clone()
    statistics = RunningStatistics(model)
    for slots in micro_batches(4):
        model(slots[0])
        for _ in range(1000):
            statistics.add()
        statistics.update(statistics.take(), 1000)
    statistics.publish()
    assert torch.equal(torch.cat([frozen.running_mean, frozen.running_var]), before)
    assert not torch.equal(model[4].running_mean, torch.zeros(CHANNELS))


def test_a_cumulative_average_is_refused_by_the_name_of_its_layer() -> None:
    """Fails when momentum None is taken for 0."""
    model = nn.ModuleDict({"stem": nn.BatchNorm2d(3), "head": nn.BatchNorm2d(3, momentum=None)})
    with pytest.raises(UserError) as caught:
        RunningStatistics(model)
    assert "'head'" in message(caught)


def test_a_model_without_batch_norm_works() -> None:
    """Also one whose batch-norm tracks nothing. Fails when an empty list is concatenated."""
    for model in (nn.Linear(2, 2), nn.BatchNorm1d(3, track_running_stats=False)):
        statistics = RunningStatistics(model)
        assert len(statistics) == 0
        statistics.add()
        statistics.update(statistics.take(), 4)
        statistics.publish()


def test_after_a_forward_with_nan_and_publish_later_statistics_are_clean() -> None:
    """A step that was not applied is forgotten: equal, bit for bit, to a run that never saw it.

    Fails without `publish`: momentum 1 computes 0 x NaN of what the buffers hold.
    """
    clean, poisoned = small_net(), small_net()
    clean_statistics, statistics = RunningStatistics(clean), RunningStatistics(poisoned)
    poisoned(torch.full((SIZE, CHANNELS, 3, 2), torch.nan))
    statistics.add()
    assert statistics.take().isnan().any()
    statistics.publish()
    x = micro_batches(4)
    run_steps(clean, clean_statistics, x)
    run_steps(poisoned, statistics, x)
    assert torch.equal(statistics.running, clean_statistics.running)


@pytest.mark.parametrize("is_exact", [True, False])
def test_exact_sums_have_the_same_bits_whoever_adds_what(is_exact: bool) -> None:
    """Statistics of 64 micro-batches from 1e-9 to 1e5, in any order, as the sums of one rank and of three. In float64
    alone they differ: the test can tell. Mutation: one word per statistic.
    """
    layer = nn.BatchNorm1d(CHANNELS)
    statistics = RunningStatistics(layer, is_exact)
    generator = np.random.default_rng(0)
    values = torch.from_numpy(10 ** generator.uniform(-9, 5, (64, 2 * CHANNELS))).float()

    def summed(groups: list[np.ndarray]) -> torch.Tensor:
        total = torch.zeros_like(statistics.sums)
        for group in groups:
            for number in group:
                statistics.load(values[number])
                statistics.add()
            total += statistics.take()
        return total

    one, three = ([*np.array_split(generator.permutation(64), ranks)] for ranks in (1, 3))
    assert torch.equal(summed(one), summed(three)) == is_exact
    before = statistics.running.clone()
    statistics.update(summed(three), 64)
    expected = 0.9 * before.double() + 0.1 * values.double().mean(0)
    torch.testing.assert_close(statistics.running.double(), expected, rtol=1e-6, atol=0)
