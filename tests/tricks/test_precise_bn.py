"""Re-estimated batch-norm statistics against NumPy's float64 over the very activations, and fvcore.

Every mutation named here was tried; that the test fails then is what it is for.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from fvcore.nn import update_bn_stats
from helpers import message
from hypothesis import given, settings
from hypothesis import strategies as st
from precise_bn import SIZES
from running import run_ranks
from timm.layers import BatchNormAct2d
from torch import nn

from dist_trainer.errors import UserError
from dist_trainer.tricks.batch_norm import BatchNorm, RunningStatistics
from dist_trainer.tricks.precise_bn import PreciseBnConfig, State, merge, re_estimate

CONTIGUOUS, CHANNELS_LAST, BF16 = 1e-6, 1e-4, 5e-4  # what torch's kernels reach; see re_estimate


def small_net() -> nn.Module:
    """Batch-norm of torch and timm, dropout beside and inside of them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(6, 5, 3), BatchNormAct2d(5, drop_layer=nn.Dropout),
        nn.Flatten(), nn.Linear(20, 4), nn.BatchNorm1d(4, momentum=None),
    )  # fmt: skip


def drifting(num_batches: int = 4, size: int = 8) -> list[torch.Tensor]:
    """float32 [m, 3, 6, 6], each micro-batch three standard deviations further from zero than the last one."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 6, 6, generator=generator) + 3 * number for number in range(num_batches)]


def counted(batches: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, bool]]:
    return [(batch, True) for batch in batches]


def watch(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The inputs of every batch-norm layer from now on, in float64."""
    seen = defaultdict(list)
    for name, layer in model.named_modules():
        if isinstance(layer, BatchNorm):
            layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].double()))
    return seen


def assert_pooled(state: State, seen: dict[str, list[torch.Tensor]], tolerance: float) -> None:
    """`state` is what NumPy makes of the pooled activations: the mean within `tolerance` of the larger of itself and
    the standard deviation, the variance (ddof=1) relative to itself."""
    assert set(state) == {f"{name}.running_{what}" for name in seen for what in ("mean", "var")}
    for name, inputs in seen.items():
        x = np.concatenate([each.transpose(0, 1).flatten(1).numpy() for each in inputs], axis=1)
        mean, variance = x.mean(1), x.var(1, ddof=1)
        got_mean, got_variance = (state[f"{name}.running_{what}"] for what in ("mean", "var"))
        assert got_mean.dtype == got_variance.dtype == torch.float32
        error = np.abs(got_mean.double().numpy() - mean) / np.maximum(np.abs(mean), np.sqrt(variance))
        assert error.max() < tolerance, (name, error)
        error = np.abs(got_variance.double().numpy() / variance - 1)
        assert error.max() < tolerance, (name, error)


def apply(model: nn.Module, state: State) -> None:
    buffers = dict(model.named_buffers())
    for name, value in state.items():
        buffers[name].copy_(value)


def everything(model: nn.Module) -> list[Any]:
    """What re-estimation touches: modes, momenta, hooks, and where every buffer lies."""
    return [
        (module.training, getattr(module, "momentum", None), len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.modules()
    ] + [buffer.data_ptr() for buffer in model.buffers()]


def same_bits(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(one[k].numpy().tobytes() == other[k].numpy().tobytes() for k in one)


PART = st.tuples(st.integers(0, 10**6), st.floats(-1000, 1000), st.floats(0.5, 2))


@given(st.lists(PART, min_size=1, max_size=8).filter(lambda parts: any(n for n, _, _ in parts)))
@settings(max_examples=200)
def test_merging_is_exact_to_1e12(parts: list[tuple[int, float, float]]) -> None:
    """Against fractions, for any n (0 too), means of up to 1,000 standard deviations: at once, and one after another.

    Mutations: no n (mean_k - mean)^2; the plain mean of means; float32; E[x^2] - mean^2 (fails by 1e-10).
    """
    given = [(Fraction(n), Fraction(mean), Fraction(n * variance)) for n, mean, variance in parts]
    n = sum(part[0] for part in given)
    mean = sum(part[0] * part[1] for part in given) / n
    m2 = sum(part[2] + part[0] * (part[1] - mean) ** 2 for part in given)
    rows = torch.tensor([[float(x) for x in part] for part in given], dtype=torch.float64)[:, :, None]
    step_by_step = torch.zeros(3, 1, dtype=torch.float64)
    for row in rows:
        step_by_step = merge(torch.stack([step_by_step, row]))
    for result in (merge(rows), step_by_step):
        assert result[0].item() == n
        assert abs(Fraction(result[1].item()) - mean) <= Fraction(1e-12) * max(1, abs(mean))
        assert abs(Fraction(result[2].item()) - m2) <= Fraction(1e-12) * m2


@given(st.lists(st.integers(2, 12), min_size=1, max_size=8), st.integers(0, 2**31))
@settings(max_examples=50)
def test_the_same_samples_split_in_any_way_give_the_same_statistics(sizes: list[int], seed: int) -> None:
    """Micro-batches of any sizes, and one of all. Mutations: every micro-batch weighs the same; mean of variances."""
    x = torch.randn(sum(sizes), 4, 2, 2, generator=torch.Generator().manual_seed(seed)).cumsum(0)
    layer = nn.BatchNorm2d(4)
    parts, whole = (re_estimate(layer, counted(batches), layer) for batches in (x.split(sizes), [x]))
    assert parts.keys() == whole.keys() == {"running_mean", "running_var"}
    scale = whole["running_mean"].abs().maximum(whole["running_var"].sqrt())
    assert ((parts["running_mean"] - whole["running_mean"]).abs() / scale).max() < CONTIGUOUS
    assert (parts["running_var"] / whole["running_var"] - 1).abs().max() < CONTIGUOUS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """World size -> what every rank returned and saw; see tests/ranks/precise_bn.py."""
    folder = tmp_path_factory.mktemp("precise")
    for size in (1, 2, 3, 4):
        run_ranks(size, "precise_bn", folder)
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in (1, 2, 3, 4)}


@pytest.mark.parametrize("case", ["plain", "ranks without a batch", "synchronised"])
def test_any_world_pools_what_all_its_ranks_saw(ranks: dict[int, Any], case: str) -> None:
    """Worlds 1 to 4, five uneven drifting micro-batches (or two): ranks run one, two or none that count, all equally
    many. The same bits on every rank, and NumPy's pooled float64 statistics of all that counted; one collective.

    Mutations: merge over batches, or over ranks, without the between term; no collective; let surplus batches count;
    give each rank the same weight; SyncBatchNorm's own buffers; gather float32.
    """
    for results in ranks.values():
        states = [result[case][0] for result in results]
        assert all(same_bits(state, states[0]) for state in states)
        assert all(result[case][2] == ["torch.float64"] for result in results)
        seen = defaultdict(list)
        for result in results:
            for name, inputs in result[case][1].items():
                seen[name] += inputs
        assert_pooled(states[0], seen, CONTIGUOUS)


def test_exact_sums_pool_to_the_same_bits_on_every_world(ranks: dict[int, Any]) -> None:
    """n, mean and M2 in float64, with surplus batches on 2, 3 and 4 ranks. Mutations: pool by rank first; a surplus
    batch counts.
    """
    totals = [result["exact"] for results in ranks.values() for result in results]
    assert totals[0][0].max() == sum(SIZES) * 16
    assert all(torch.equal(total, totals[0]) for total in totals)


def test_worlds_agree(ranks: dict[int, Any]) -> None:
    """1 to 4 ranks, to float32's rounding: a micro-batch is normalised by itself wherever it runs.

    Mutation: divide M2 by n - world.
    """
    states = [results[0]["plain"][0] for results in ranks.values()]
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=CONTIGUOUS, atol=CONTIGUOUS)


@pytest.mark.parametrize("ratio", [0, 30, 1000])
@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", CONTIGUOUS), ("nhwc", CHANNELS_LAST), ("bf16", BF16)])
def test_statistics_are_as_good_as_the_kernels(kind: str, tolerance: float, ratio: int) -> None:
    """Pooled float64 statistics of the same activations where mean / std is 0, 30 and 1,000.

    Mutations: the between term of batches left out; E[x^2] - mean^2 in float32; Bessel's factor left in.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    model = model.to(memory_format=torch.channels_last if kind == "nhwc" else torch.contiguous_format)
    batches = [(torch.randn(32, 3, 28, 28) + ratio) for _ in range(6)]
    if kind == "nhwc":
        batches = [batch.to(memory_format=torch.channels_last) for batch in batches]
    if kind == "bf16":
        batches = [batch.bfloat16() for batch in batches]
    seen = watch(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        state = re_estimate(model, counted(batches), model)
    assert_pooled(state, seen, tolerance)


def test_thousands_of_micro_batches_lose_nothing() -> None:
    """3,000 of them to 2e-7: float32's rounding of the result, 6e-8, and of each batch's statistics, which averages.

    Mutation: pool in float32, which loses some 1e-6.
    """
    layer = nn.BatchNorm2d(3)
    batches = torch.randn(3000, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + 1
    state = re_estimate(layer, counted(batches), layer)
    assert_pooled({f"layer.{name}": value for name, value in state.items()}, {"layer": [*batches.double()]}, 2e-7)


def test_fvcore_finds_the_same_on_one_rank() -> None:
    """Where its float32 E[x^2] - mean^2 is accurate. It divides by n, torch's buffers by n - 1.

    Mutations: mean of variances; Bessel's factor left in, in the batch or in the sum.
    """
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)]
    model = nn.Sequential(*layers).train()
    batches = drifting(3)
    state = re_estimate(model, counted(batches), model)
    update_bn_stats(model, batches, num_iters=len(batches))
    for number, pixels in ((1, 16), (4, 4)):
        n = 3 * 8 * pixels
        torch.testing.assert_close(state[f"{number}.running_mean"], model[number].running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            state[f"{number}.running_var"] * (n - 1) / n, model[number].running_var, rtol=1e-5, atol=0
        )


def test_one_batch_of_the_whole_set_makes_evaluation_what_training_was() -> None:
    """The training-mode output in evaluation mode. Training divides by n, buffers hold n - 1: taken back here.

    Mutations: the biased variance in the result, or Bessel's factor left in each batch's.
    """
    model = small_net()
    model[3].p = model[5].drop.p = 0.0
    (batch,) = drifting(1, size=64)
    expected = model.train()(batch)
    state = re_estimate(model, counted([batch]), model)
    apply(model, state)
    torch.testing.assert_close(model.eval()(batch), expected, rtol=0, atol=0.1)  # sqrt(1 - 1 / 64), last layer
    for number, n in ((1, 64 * 16), (5, 64 * 4), (8, 64)):
        model[number].running_var *= (n - 1) / n
    torch.testing.assert_close(model.eval()(batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_batch_norm_alone_is_in_training_mode_whatever_the_model_was_in(mode: bool) -> None:
    """Dropout stays off and draws nothing, that inside timm's layer too; a model in evaluation mode is no no-op.

    Mutations: model.train(); layer.train(), which turns on timm's dropout; only layers that were training.
    """
    model = small_net().train(mode)
    training = []

    def forward(batch: torch.Tensor) -> None:
        model(batch)
        training.append({name for name, module in model.named_modules() if module.training})

    random = torch.get_rng_state()
    seen = watch(model)
    assert_pooled(re_estimate(model, counted(drifting()), forward), seen, CONTIGUOUS)
    assert training == [{"1", "5", "8"}] * 4
    assert torch.equal(torch.get_rng_state(), random)


class Halfway(nn.Module):
    """Raises in its third forward, amid a model."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return x


@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_is_left_changed_on_any_way_out(interrupted: bool) -> None:
    """Buffers and counters bit for bit, NaN too, and where they are; weights, modes, momenta, hooks; requires_grad.

    Mutations: restore outside of `finally`; forget modes, momenta, buffers or counters; bind buffers anew; hooks stay.
    """
    model = small_net()
    model[2] = Halfway() if interrupted else model[2]
    model[4].eval()
    for batch in drifting():
        small = model[1](model[0](batch))
    assert small.requires_grad
    model[5].running_var[0] = torch.nan
    values, rest = copy.deepcopy(model.state_dict()), everything(model)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            re_estimate(model, counted(drifting()), model)
        assert model[2].calls == 3
    else:
        assert len(re_estimate(model, counted(drifting()), model)) == 6
    assert everything(model) == rest
    assert same_bits(model.state_dict(), values)
    assert torch.is_grad_enabled()


def test_training_goes_on_as_if_nothing_had_been_re_estimated() -> None:
    """Bit for bit the same running statistics, with buffers that are views of one tensor and momentum 1.

    Mutation: buffers left at the last batch.
    """
    quiet, loud = (nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)) for _ in range(2))
    loud.load_state_dict(quiet.state_dict())
    through, broken = RunningStatistics(quiet), RunningStatistics(loud)
    for batch in drifting():
        for model, statistics in ((quiet, through), (loud, broken)):
            model(batch)
            if model is loud:
                re_estimate(model, counted(drifting(2)), model)
            statistics.add()
            statistics.update(statistics.take(), 1)
    for statistics in (through, broken):
        statistics.publish()
    assert same_bits(quiet.state_dict(), loud.state_dict())


def test_a_nan_in_the_old_buffers_or_in_a_surplus_batch_is_harmless() -> None:
    """Bit for bit what a clean model gives. Mutations: no clearing before the first forward, or between forwards."""
    batches = counted(drifting())
    model = small_net()
    clean = re_estimate(model, batches, model)
    for number in (1, 5, 8):
        model[number].running_mean.fill_(torch.nan)
        model[number].running_var.fill_(torch.inf)
    assert same_bits(re_estimate(model, batches, model), clean)
    poison = (torch.full_like(batches[0][0], torch.nan), False)
    assert same_bits(re_estimate(model, [*batches[:2], poison, *batches[2:], poison], model), clean)


@pytest.mark.parametrize("surplus", [False, True])
def test_one_value_per_channel_is_refused_by_the_name_of_its_layer(surplus: bool) -> None:
    """And nothing is left changed. Mutation: no check, so that torch's ValueError names a shape alone, or NaN comes."""
    model = nn.ModuleDict({"stem": nn.BatchNorm2d(3), "head": nn.BatchNorm1d(3)})
    rest, values = everything(model), copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as caught:
        re_estimate(
            model, [(torch.randn(1, 3, 2, 2), not surplus)], lambda x: model["head"](model["stem"](x).mean((2, 3)))
        )
    assert "'head'" in message(caught)
    assert "[1, 3]" in message(caught)
    assert everything(model) == rest
    assert same_bits(model.state_dict(), values)


class Branches(nn.Module):
    """`twice` runs two times in a forward, `now_and_then` for positive batches, `never` never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.now_and_then, self.never = (nn.BatchNorm2d(3) for _ in range(3))
        self.frozen = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.twice(x) * 2 + 1)
        if x.mean() > 0:
            x = self.now_and_then(x[:4] * 3)
        return self.twice(x.mean(0, keepdim=True) + 5)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_layer_that_runs_twice_counts_both_and_one_that_never_runs_keeps_its_own(bf16: bool) -> None:
    """Pooled over both uses of every forward, of different n; also amid autocast, which must not reach the sums.

    Mutations: only the last use counts; n of the first for both; unused layers come back as 0 and 1, or NaN.
    """
    model = Branches()
    seen = watch(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        state = re_estimate(model, counted(drifting()), model)
    del seen["frozen"]
    assert len(seen["twice"]) == 8
    assert "never" not in seen
    assert_pooled(state, seen, CONTIGUOUS)


def test_a_layer_that_only_surplus_batches_reach_keeps_its_own() -> None:
    """No result, no forward needed to be counted. Mutation: a division by n - 1 of nothing."""
    layer = nn.BatchNorm2d(3)
    assert re_estimate(layer, [(drifting()[0], False)], layer) == {}
    assert re_estimate(layer, [], layer) == {}


def test_a_model_without_running_statistics_is_not_even_run() -> None:
    """Mutation: concatenate an empty list."""
    for model in (nn.Linear(2, 2), nn.BatchNorm2d(3, track_running_stats=False)):
        assert re_estimate(model, counted(drifting()), lambda _: pytest.fail("ran")) == {}


def test_synchronised_layers_are_pooled_by_what_their_own_rank_saw() -> None:
    """torch's SyncBatchNorm in one process is a BatchNorm2d. Mutation: the biased variance."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    for model in (plain, synchronised):
        seen = watch(model)
        assert_pooled(re_estimate(model, counted(drifting()), model), seen, CONTIGUOUS)


@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(1, 10_000))
def test_slots_are_whole_micro_batches_at_least_one_and_at_most_the_set(num: int, micro: int, size: int) -> None:
    """None when off. Mutations: round up; forget the set; 0 for a set that is smaller than a micro-batch."""
    slots = PreciseBnConfig(num_samples=num).num_slots(micro, size)
    if num == 0:
        assert slots == 0
    else:
        assert slots == 1 or slots * micro <= min(num, size)
        assert slots >= 1
        assert (slots + 1) * micro > min(num, size)


def test_a_negative_number_of_samples_is_refused() -> None:
    """Mutation: max(1, ...) makes it one micro-batch."""
    with pytest.raises(UserError) as caught:
        PreciseBnConfig(num_samples=-1).num_slots(8, 100)
    assert "precise_bn.num_samples" in message(caught)
