"""Keyed draws and the order of an epoch, against a second implementation in plain Python and pinned values."""

import hashlib
import math
from collections import Counter

import helpers  # noqa: F401  (hypothesis without a deadline)
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_trainer import draws as keyed
from dist_trainer.data.order import ClassOrder, EpochOrder, OrderSpec

GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """One draw of Vigna's splitmix64.c: next() of a generator that stands at `state`."""
    z = (state + GOLDEN) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def plain_key(*parts: int) -> int:
    state = GOLDEN
    for part in parts:
        state = splitmix64(state ^ (part % 2**64))
    return state


def plain_permutation(size: int, *parts: int) -> list[int]:
    """Numbers sorted by the draws of a generator that stands one step before the key."""
    draws = [splitmix64((plain_key(*parts) + (n - 1) * GOLDEN) % 2**64) for n in range(size)]
    return sorted(range(size), key=draws.__getitem__)


def plain_permute(value: int, size: int, key: int) -> int:
    """The Feistel walk as keyed.permute describes it, for one value."""
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)

    def draw(x: int, *parts: int) -> int:
        return splitmix64((plain_key(*parts) + ((x + key) - 1) * GOLDEN) % 2**64)

    while True:
        left, right = divmod(value, b)
        for number in range(6):
            left = (left + draw(right, number, 0)) % 2**64 % a
            right = (right + draw(left, number, 1)) % 2**64 % b
        value = left * b + right
        if value < size:
            return value


def plain_window_order(counts: list[int], spec: OrderSpec, epoch: int) -> list[int]:
    """The window order as its docstring describes it, sample by sample."""
    blocks, first = [], 0
    for count in counts:
        blocks += [list(range(first + a, first + min(a + spec.block, count))) for a in range(0, count, spec.block)]
        first += count
    laid = [i for b in plain_permutation(len(blocks), keyed.BLOCKS, spec.seed, epoch) for i in blocks[b]]
    lane_of = [p // spec.chunk % spec.lanes for p in range(len(laid))]
    lanes, begin = [], 0
    for lane in range(spec.lanes):
        ids = laid[begin : begin + lane_of.count(lane)]
        begin += len(ids)
        shift = lane * spec.window // spec.lanes
        mixed = []
        for number in range(len(ids) // spec.window + 2):
            window = ids[max(0, number * spec.window - shift) : max(0, (number + 1) * spec.window - shift)]
            order = plain_permutation(len(window), keyed.WINDOW, spec.seed, epoch, lane, number)
            mixed += [window[k] for k in order]
        lanes.append(iter(mixed))
    return [next(lanes[lane]) for lane in lane_of]


layouts = st.lists(st.integers(0, 150), min_size=1, max_size=8).filter(any)
specs = st.builds(
    OrderSpec,
    seed=st.integers(-(2**40), 2**40),
    lanes=st.integers(1, 16),
    chunk=st.integers(1, 8),
    block=st.integers(1, 64),
    window=st.integers(1, 128),
    kind=st.sampled_from(["window", "full", "none"]),
)


def test_keys_and_hashes_are_those_of_the_published_splitmix64() -> None:
    """The first outputs of splitmix64.c for seeds 0 and 1234567, through `key`, `hashes` and the copy above.

    Fails when a shift or a constant of keyed.py changes.
    """
    assert splitmix64(0) == keyed.key(GOLDEN) == 0xE220A8397B1DCDAF
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567 + n * GOLDEN) for n in range(4)] == published
    start = (1234567 - keyed.key(5)) * pow(GOLDEN, -1, 2**64) % 2**64  # where hashes under key 5 continue that stream
    assert keyed.hashes(np.array([start], np.uint64) + np.arange(1, 5, dtype=np.uint64), 5).tolist() == published


@given(st.lists(st.integers(-(2**63), 2**64), max_size=4), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_scalar_keys_and_array_hashes_agree_with_plain_python(parts: list[int], values: list[int]) -> None:
    """Fails when the array form mixes another way than the scalar one, or a negative part is not reduced."""
    assert keyed.key(*parts) == plain_key(*parts)
    expected = [splitmix64((plain_key(*parts) + (value - 1) * GOLDEN) % 2**64) for value in values]
    assert keyed.hashes(np.array(values, np.int64), *parts).tolist() == expected


@given(st.integers(0, 500), st.lists(st.integers(0, 9), max_size=3))
def test_a_keyed_permutation_is_the_sort_of_its_draws(size: int, parts: list[int]) -> None:
    """Fails when the sort is of anything but the hashes, or the permutation is inverted."""
    order = keyed.permutation(size, *parts)
    assert sorted(order.tolist()) == list(range(size))
    assert order.tolist() == plain_permutation(size, *parts)


def test_a_walked_permutation_is_a_bijection_without_a_favourite() -> None:
    """Sizes 1 to 200, any part of it alone, and over 20,000 keys every value lands everywhere equally often.

    Chi-square of each place of 10: the 99.99% quantile of 9 degrees of freedom is 33.7. Fails with one round.
    """
    for size in range(1, 201):
        keys = np.full(size, keyed.key(size), np.uint64)
        whole = keyed.permute(np.arange(size), size, keys)
        assert sorted(whole.tolist()) == list(range(size))
        assert keyed.permute(np.arange(size)[size // 2 :], size, keys[0]).tolist() == whole[size // 2 :].tolist()
    keys = keyed.hashes(np.arange(20_000), 1)
    images = keyed.permute(np.arange(10)[:, None], 10, keys[None])
    for place in range(10):
        counts = np.bincount(images[place], minlength=10)
        assert ((counts - 2000.0) ** 2 / 2000.0).sum() < 33.7


def test_keyed_uniform_draws_are_uniform() -> None:
    """Chi-square of 65,536 draws in 256 bins: 0.1% and 99.9% quantiles of 255 degrees of freedom are 190.9 and 330.5.

    Fails when a bit is lost (a shift by 12 with the same scale), or the draws are not mixed.
    """
    draws = keyed.uniform(np.arange(65_536), keyed.FLIP, 1, 2)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = np.bincount((draws * 256).astype(int), minlength=256)
    assert 190.9 < ((counts - 256.0) ** 2 / 256.0).sum() < 330.5


@given(layouts, specs, st.integers(0, 3))
def test_every_order_is_a_bijection(counts: list[int], spec: OrderSpec, epoch: int) -> None:
    """An epoch visits each sample once, whatever the shards' sizes, lanes, chunks, blocks and windows.

    Fails when a lane's length forgets the rest of the division, or a window is cut one sample short.
    """
    order = EpochOrder(counts, spec, epoch)
    assert order.size == sum(counts)
    assert sorted(order.ids(0, order.size).tolist()) == list(range(sum(counts)))


@given(layouts, specs, st.integers(0, 3), st.data())
def test_a_slice_of_the_order_does_not_depend_on_how_it_is_asked_for(
    counts: list[int], spec: OrderSpec, epoch: int, data: st.DataObject
) -> None:
    """Any slices, in any sequence, are those of the whole epoch, for a reader that starts there or goes on.

    Fails when the window that is kept per lane is not told apart by its number.
    """
    whole = EpochOrder(counts, spec, epoch).ids(0, sum(counts)).tolist()
    used = EpochOrder(counts, spec, epoch)
    for _ in range(4):
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, len(whole)))
        assert used.ids(start, stop).tolist() == whole[start:stop]
        assert EpochOrder(counts, spec, epoch).ids(start, stop).tolist() == whole[start:stop]


@given(layouts, specs, st.integers(0, 3))
def test_the_order_is_the_one_that_is_described(counts: list[int], spec: OrderSpec, epoch: int) -> None:
    """Blocks permuted, cut into lanes, lanes permuted in staggered windows, chunks dealt from lane to lane.

    Fails when the stagger is dropped, a block crosses a shard, or the epoch is left out of a key.
    """
    ids = EpochOrder(counts, spec, epoch).ids(0, sum(counts)).tolist()
    if spec.kind == "none":
        assert ids == list(range(sum(counts)))
    elif spec.kind == "full":
        total = sum(counts)
        assert ids == [plain_permute(p, total, plain_key(keyed.FULL, spec.seed, epoch)) for p in range(total)]
    else:
        assert ids == plain_window_order(counts, spec, epoch)


@pytest.mark.parametrize(
    ("kind", "first", "digest"),
    [
        (
            "window",
            [2990, 2037, 1397, 3017, 3070, 2966, 420, 1381, 3589, 1674, 1039, 1085, 1031, 1632, 1638, 203],
            "ce3b77b174567804914de0028b13f7820b18859c05a594908db51550269301a2",
        ),
        (
            "full",
            [200, 3257, 4257, 3540, 13, 1354, 1543, 1425, 2438, 2205, 3663, 516, 3487, 297, 641, 3817],
            "c810e545a6d78ae9d113cf4b3db9ce62fe3dd8b2d2b4f889746eba7d5a40f71a",
        ),
    ],
)
def test_the_order_never_changes_between_releases(kind: str, first: list[int], digest: str) -> None:
    """Pinned: a checkpoint's position means the same samples tomorrow. If this fails, restore the order.

    Fails when any constant, key or default of the order changes.
    """
    spec = OrderSpec(seed=7, lanes=16, chunk=8, kind=kind)  # type: ignore[arg-type]
    ids = EpochOrder([1300, 1, 64, 2000, 777, 1251], spec, epoch=3).ids(0, 5393)
    assert ids[:16].tolist() == first
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == digest


def test_two_epochs_and_two_seeds_differ() -> None:
    """Fewer than 1% of the positions agree by chance. Fails when epoch or seed is left out of the keys."""
    for kind in ("window", "full"):
        one, other_epoch, other_seed = (
            EpochOrder([1000] * 8, OrderSpec(seed=seed, lanes=16, chunk=8, kind=kind), epoch).ids(0, 8000)  # type: ignore[arg-type]
            for seed, epoch in ((0, 0), (0, 1), (1, 0))
        )
        assert (one == other_epoch).mean() < 0.01
        assert (one == other_seed).mean() < 0.01


def test_a_batch_mixes_hundreds_of_shards() -> None:
    """1,024 samples out of 1.28 M in 1,024 shards, away from an epoch's ends, where staggered windows are short.

    Fails when consecutive chunks come from one lane, or windows are as small as blocks.
    """
    counts = [1251] * 1023 + [1394]  # 1,281,167 samples
    order = EpochOrder(counts, OrderSpec(seed=0, lanes=128, chunk=8), 0)
    shard_ends = np.cumsum(counts)
    for start in (100_000, 640_000, 1_200_000):
        shards = np.searchsorted(shard_ends, order.ids(start, start + 1024), side="right")
        assert len(set(shards.tolist())) >= 400


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=120).filter(lambda labels: max(labels) >= 0), st.data())
def test_balanced_shows_each_class_equally_often_and_its_samples_in_turn(
    labels: list[int], data: st.DataObject
) -> None:
    """Every epoch the same number per class; over epochs each sample of a class once before any comes again.

    Bad samples (label -1) never. Any slice is that of the whole. Fails when a round misses a class, or a class's
    cycle starts anew with every epoch.
    """
    order = ClassOrder(np.array(labels, np.int32), seed=data.draw(st.integers(0, 9)))
    epochs = [order.ids(epoch, 0, order.size).tolist() for epoch in range(4)]
    sizes = Counter(label for label in labels if label >= 0)
    per_class = max(1, sum(sizes.values()) // len(sizes))
    for epoch in epochs:
        assert Counter(labels[i] for i in epoch) == dict.fromkeys(sizes, per_class)
    for label, size in sizes.items():
        seen = [i for epoch in epochs for i in epoch if labels[i] == label]
        for cycle in range(len(seen) // size):
            part = seen[cycle * size : (cycle + 1) * size]
            assert sorted(part) == [i for i, other in enumerate(labels) if other == label]
    start = data.draw(st.integers(0, order.size - 1))
    assert order.ids(2, start, order.size).tolist() == epochs[2][start:]


def test_the_balanced_order_never_changes_between_releases() -> None:
    """Pinned, as the others are. Fails when a key or a constant of it changes."""
    labels = np.arange(1000, dtype=np.int32) % 7 % 5
    ids = ClassOrder(labels, seed=7).ids(3, 0, 995)
    assert ids[:8].tolist() == [642, 11, 366, 643, 262, 819, 192, 331]
    assert (
        hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        == "ae7f68e9886d59ffecb2a833bea0ad24edee994cb4b22165a264bfde0dd6f095"
    )
