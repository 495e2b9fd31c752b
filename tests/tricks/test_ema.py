"""The moving average against its closed form and timm's, without ranks; with them in test_weights_ranks.py."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import message
from timm.utils import ModelEmaV3
from torch import nn

from dist_trainer.errors import UserError
from dist_trainer.tricks.ema import Ema, EmaConfig, decay_at

State = dict[str, torch.Tensor]


def ema_of(weights: State, total: int, start: int = 0, **values: Any) -> Ema:
    return Ema(EmaConfig(**values), weights, torch.zeros(2), start, total)


def follow(ema: Ema, weights: State, values: list[float]) -> None:
    """One applied update per value; its statistics come one update later."""
    for value in values:
        ema.settle()
        weights["w"].fill_(value)
        ema.update()
    for value in values:
        ema.update_statistics(torch.full((2,), value))


RAMPS: dict[str, Callable[[int, int], float]] = {
    "constant": lambda s, total: 0.9,
    "threshold": lambda s, total: min(0.9, (1 + s) / (10 + s)),
    "exponential": lambda s, total: 0.9 * (1 - math.exp(-15 * s / total)),
}


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 3), (7, 1), (7, 2)])
def test_it_is_the_closed_form_of_its_ramp(ramp: str, start: int, every: int) -> None:
    """A weighted sum of all values, in float64: each value times the decays of all later updates.

    Fails when the ramp counts from the run's start instead of the average's, when `every` forgets its power, and when
    statistics go another way than weights.
    """
    total, weights = 60, {"w": torch.full((3,), 0.5)}
    values = [math.sin(3.0 * n) for n in range(total)]
    ema = ema_of(weights, total, start, decay=0.9, ramp=ramp, every=every)
    follow(ema, weights, values)
    begun = 0.5 if not start else values[start - 1]
    shares, rest = [], 1.0
    for s in reversed(range(total - start)):
        if (s + 1) % every == 0:
            decay = RAMPS[ramp](s, total - start) ** every
            shares.append((values[start + s], rest * (1 - decay)))
            rest *= decay
    expected = rest * begun + sum(value * share for value, share in shares)
    assert ema.weights["w"].dtype == torch.float32
    assert ema.weights["w"].tolist() == pytest.approx([expected] * 3, abs=3e-7)
    if start:
        assert ema.statistics.tolist() == pytest.approx([expected] * 2, abs=3e-7)
    else:  # they began at 0
        assert ema.statistics.tolist() == pytest.approx([expected - rest * 0.5] * 2, abs=3e-7)


def test_before_its_start_there_is_none() -> None:
    weights = {"w": torch.zeros(1)}
    ema = ema_of(weights, 10, 2, decay=0.5)
    begun = []
    for value in (1.0, 2.0, 3.0):
        weights["w"].fill_(value)
        ema.update()
        begun.append((ema.has_begun, float(ema.weights["w"])))
    assert begun[0][0] is False
    assert begun[1:] == [(False, 2.0), (True, 2.5)]


def test_twenty_thousand_updates_at_0_9999_arrive() -> None:
    """From 1 towards 1.1, to 1.1 - 0.1 * 0.9999**20000. In bfloat16 it never leaves 1, which is why it is float32.

    float32 rounds each update by 6e-8 of 1; 20,000 of them, each kept 0.9999 of the time, end within 6e-4 / 2 at worst
    and were seen at 2e-6.
    """
    weights = {"w": torch.full((1,), 1.1)}
    ema = ema_of(weights, 20_000, decay=0.9999)
    ema.weights["w"].fill_(1.0)
    in_bf16 = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(20_000):
        ema.update()
        in_bf16.lerp_(weights["w"].bfloat16(), 1e-4)
    assert float(ema.weights["w"]) == pytest.approx(1.1 - 0.1 * 0.9999**20_000, abs=3e-4)
    assert float(in_bf16) == 1.0


def test_it_is_timms() -> None:
    """ModelEmaV3 with the same decay over 50 updates of a network, running statistics included: bit for bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5))
    theirs = ModelEmaV3(model, decay=0.97, foreach=True)

    def statistics() -> torch.Tensor:
        return torch.cat([model[1].running_mean, model[1].running_var])  # type: ignore[list-item]

    live = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ours = Ema(EmaConfig(decay=0.97), live, statistics(), 0, 50)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(50):
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.update(model)
        ours.update()
        ours.update_statistics(statistics())
    expected = theirs.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.weights.items())
    assert torch.equal(ours.statistics, torch.cat([expected["1.running_mean"], expected["1.running_var"]]))


def test_it_may_lie_in_host_memory_and_goes_on_from_a_checkpoint() -> None:
    """Fails when a copy shares memory with the weights, or the number of updates is not taken up."""
    values = [math.cos(2.0 * n) for n in range(20)]

    def new(device: str = "same") -> tuple[Ema, State]:
        weights = {"w": torch.zeros(3)}
        return ema_of(weights, 20, decay=0.8, ramp="threshold", device=device), weights

    whole, host, first, second = new(), new("cpu"), new(), new()
    follow(*whole, values)
    follow(*host, values)
    follow(*first, values[:9])
    second[0].load(first[0].weights, first[0].statistics, 9)
    follow(*second, values[9:])
    for ema, _ in (host, second):
        assert torch.equal(ema.weights["w"], whole[0].weights["w"])
        assert torch.equal(ema.statistics, whole[0].statistics)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"decay": 1.0}, "ema.decay: 1.0 is not in [0, 1)"),
        ({"decay": -0.1}, "ema.decay: -0.1 is not in [0, 1)"),
        ({"decay": 0.9, "every": 0}, "ema.every: 0 is not a positive number"),
        ({"decay": 0.9, "beta": 0.0}, "ema.beta: 0.0 is not positive"),
    ],
)
def test_what_makes_no_average_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        EmaConfig(**values).check()
    assert message(caught).startswith(said)


def test_ramps_at_their_corners() -> None:
    """0.1 and 0 at the first update; features of the seeds: 0.9999 after about 89,990 updates, 99% after 31%."""
    threshold, exponential = EmaConfig(decay=0.9999, ramp="threshold"), EmaConfig(decay=0.9999, ramp="exponential")
    assert decay_at(threshold, 0, 10**6) == 0.1
    assert decay_at(threshold, 89_980, 10**6) < 0.9999 == decay_at(threshold, 89_990, 10**6)
    assert decay_at(exponential, 0, 1000) == 0.0
    assert decay_at(exponential, 310, 1000) == pytest.approx(0.99 * 0.9999, abs=1e-3)
