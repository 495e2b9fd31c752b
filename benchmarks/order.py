"""The epoch's order at 1.28 million and at 100 million samples: time and memory to start, to seek, to plan a batch.

    python benchmarks/order.py [--quick] [--json FILE]

For one rank in the middle of the world, micro-batch 32. start: EpochOrder (ClassOrder, of 1,000 classes) is made. seek:
a fresh one's first micro-batch of ids; and those of the rank's whole first step. batch: one micro-batch of ids in
steady state. Memory is how far the process grew meanwhile. Times are medians, those of seek over 1%, 50% and 99% of
the epoch. index: the .dtx file of that many samples.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import SMOKE, Figures, PeakMemory, figure, machine, parser, save, text, timed
from ours import plan_of

from dist_trainer.data.index import SAMPLE, ShardIndex
from dist_trainer.data.order import ClassOrder, EpochOrder, Kind, OrderSpec
from dist_trainer.plan import Plan

MICRO_BATCH = 32
PER_SHARD = 1251
CLASSES = 1000
EPOCH = 3
WORLDS = {1: 4096, 8: 4096, 256: 8192, 4096: 131_072}
"""ranks -> global batch"""
SIZES = {200_000: "200 k"} if SMOKE else {1_281_167: "1.28 M", 100_000_000: "100 M"}


class _Balanced:
    """A class-balanced order with the face of EpochOrder."""

    def __init__(self, labels: np.ndarray) -> None:
        self._order = ClassOrder(labels, 0)

    def ids(self, start: int, stop: int) -> np.ndarray:
        return self._order.ids(EPOCH, start, stop)


def _epoch_order(counts: np.ndarray, plan: Plan, kind: Kind) -> EpochOrder:
    lanes = plan.samples_per_step // plan.chunk
    return EpochOrder(counts, OrderSpec(seed=0, lanes=lanes, chunk=plan.chunk, kind=kind), EPOCH)


def measure_order(make: Callable[[], Any], plan: Plan, rank: int, repeats: int) -> dict[str, float]:
    """`make()` has ids(start, stop)."""
    slots = plan.slots_of(rank)
    steps = int(plan.steps_per_epoch)

    def ids(order: Any, step: int, slot: int) -> None:
        span = plan.spans(step, slot)[0]
        order.ids(span.start, span.stop)

    starts, seeks, firsts, batches, memory = [], [], [], [], PeakMemory()
    for share in [0.01, 0.5, 0.99][:repeats]:
        step = int(steps * share)
        with PeakMemory() as growth:
            seconds, order = timed(make)
            starts.append(seconds)
            seeks.append(timed(lambda order=order, step=step: ids(order, step, slots[0]))[0])
            rest = timed(lambda order=order, step=step: [ids(order, step, slot) for slot in slots[1:]])[0]
            firsts.append(seeks[-1] + rest)
            addresses = itertools.islice(_addresses(step + 1, steps, slots), 400)
            seconds, count = timed(lambda order=order, all_=addresses: sum(1 for each in all_ if not ids(order, *each)))
            batches.append(seconds / max(count, 1))
        memory.growth = max(memory.growth, growth.growth)
        del order
    medians = {"start": starts, "seek": seeks, "first step": firsts, "batch": batches}
    return {name: statistics.median(each) for name, each in medians.items()} | {"memory": memory.growth}


def _addresses(step: int, steps: int, slots: range) -> Iterator[tuple[int, int]]:
    for each in range(step, steps):
        yield from ((each, slot) for slot in slots)


def counts_of(samples: int) -> np.ndarray:
    shards = samples // PER_SHARD
    counts = np.full(shards, samples // shards)
    counts[: samples % shards] += 1
    return counts


def index_figures(samples: int, counts: np.ndarray, name: str) -> Figures:
    """Save, load with and without verification, and read one batch of rows, of an index of `samples`."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "index.dtx"
        needed = samples * SAMPLE.itemsize
        if shutil.disk_usage(temporary).free < 2 * needed:
            print(f"skipped: an index of {name} samples needs {text(needed, 'B')} of free disk twice over")
            return {}
        rows = np.zeros(samples, SAMPLE)
        rows["offset"], rows["length"], rows["label"] = np.arange(samples) * 110_000 % 2**31, 104_000, 1
        index = ShardIndex(
            root=temporary,
            shards=tuple(f"{number:06d}.tar" for number in range(len(counts))),
            stamps=("",) * len(counts),
            sizes=np.full(len(counts), 2**31, np.uint64),
            first=np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64),
            samples=rows,
            class_names=("a", "b"),
        )
        results: Figures = {}
        for what, action in {
            "saved": lambda: index.save(path),
            "loaded, verified": lambda: ShardIndex.load(path),
            "loaded, as a loader worker does": lambda: ShardIndex.load(path, verify=False),
        }.items():
            with PeakMemory() as memory:
                seconds, loaded = timed(action)
            results[f"index of {name}, {what}"] = figure(seconds)
            results[f"index of {name}, {what}, memory"] = figure(memory.growth, unit="B")
        ids = np.sort(np.random.default_rng(0).integers(0, samples, MICRO_BATCH))
        for what in ("the first", "another"):
            results[f"index of {name}, {what} batch's rows and shards"] = figure(
                timed(lambda: (loaded.samples[ids], loaded.shard_of(ids)))[0]
            )
        return results


def main() -> None:
    arguments: argparse.Namespace = parser(
        __doc__, "one position; of 100 M no balanced order and no index"
    ).parse_args()
    print(machine())
    columns = ("start", "seek", "first step", "batch", "memory")
    if not SMOKE:
        print(f"\n{'order':<44}" + "".join(f"{name:>12}" for name in columns))
    figures: Figures = {}

    def show(title: str, found: dict[str, float]) -> None:
        units = {name: "B" if name == "memory" else "s" for name in columns}
        shown = "ran" if SMOKE else "".join(f"{text(found[name], units[name]):>12}" for name in columns)
        print(f"{title:<44}{shown}", flush=True)
        figures.update({f"{title}, {name}": figure(found[name], unit=units[name]) for name in columns})

    kinds: tuple[Kind, ...] = ("window", "full")
    for samples, name in SIZES.items():
        counts = counts_of(samples)
        for kind, (world, batch) in itertools.product(kinds, WORLDS.items()):
            plan = plan_of(samples, batch, MICRO_BATCH, world)
            make = partial(_epoch_order, counts, plan, kind)
            found = measure_order(make, plan, world // 2, 1 if arguments.quick else 3)
            show(f"{name}, {kind}, {world} ranks, batch {batch}", found)
        if not arguments.quick or samples < 10_000_000:
            labels = np.random.default_rng(0).integers(0, CLASSES, samples, dtype=np.int32)
            plan = plan_of(samples, WORLDS[8], MICRO_BATCH, 8)
            show(f"{name}, balanced, 8 ranks, batch {WORLDS[8]}", measure_order(partial(_Balanced, labels), plan, 4, 1))
            del labels
    print()
    for samples, name in SIZES.items():
        if not arguments.quick or samples < 10_000_000:
            found = index_figures(samples, counts_of(samples), name)
            for title, each in found.items():
                print(f"{title:<64}{'ran' if SMOKE else text(each['ours'], each['unit']):>12}", flush=True)
            figures |= found
    save(arguments.json, figures)


if __name__ == "__main__":
    main()
