"""Loading: images per second and core, seconds to the first batch after a resume, a whole epoch of small images.

    python benchmarks/loader.py [--quick] [--json FILE] [--only decode,resume,epoch,parts] [--rounds N]

decode  JPEG to a batch of 64: decode, RandomResizedCrop(224), flip. CPU time of one thread, so that what else runs on
        the machine counts little; sides take turns. uint8 is for a device that normalises; float32 is normalised.
resume  From a position in an epoch of 1.28 M samples to the first batch, against webdataset's only way: skip to it.
        Its time is a measured rate of skipping without decoding, times the samples before.
epoch   Draining one epoch of Fashion-MNIST (`make data`), against torch's DataLoader over tensors in memory.
parts   Where our CPU time goes, per image.
"""

import argparse
import itertools
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from few import few_fashion
from machine import DATA, SMOKE, Figures, figure, interleaved, machine, parser, save, table, timed
from ours import ALONE, OURS, augment_of, photograph_samples, plan_of, train_samples
from parts import measure_parts
from photographs import photographs
from torch.utils.data import DataLoader, TensorDataset

from dist_trainer.data.augment import Augment, AugmentConfig, CropConfig
from dist_trainer.data.batch import SlotAddress
from dist_trainer.data.config import DataConfig
from dist_trainer.data.decode import decode
from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.data.read import Bad, Reader
from dist_trainer.data.stream import TrainStream

BATCH = 64
IMAGENET, SHARDS = 1_281_167, 1024


def decode_figures(arguments: argparse.Namespace) -> Figures:
    """Images per second of CPU time."""
    folder, count = photographs(), 1 if SMOKE else 2
    running: dict[str, Iterator[Any]] = {}
    for name, start in [*((f"ours, {name}", side) for name, side in OURS.items()), *peers.PEERS.items()]:
        batches = start(folder, BATCH)
        try:
            next(batches)
        except Exception as error:  # whatever an installation that does not work raises
            print(f"skipped: {name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        running[name] = batches
    sides = {name: partial(_drain, itertools.islice, batches, count) for name, batches in running.items()}
    seconds = interleaved(sides, arguments.rounds or (7 if arguments.quick else 15))
    rate = {name: BATCH * count / each for name, each in seconds.items()}
    return {
        f"{ours} against {peer}": figure(rate[f"ours, {ours}"], rate[peer], "images/s")
        for ours in OURS
        for peer in running
        if peer in peers.PEERS
    }


def _drain(take: Callable[..., Iterator[Any]], *arguments: Any) -> None:
    for _ in take(*arguments):
        pass


def imagenet_index(path: Path) -> None:
    """An index of ImageNet's size in 1,024 shards, whose rows repeat the photographs' bytes."""
    real = ShardIndex.load(photographs() / "packed/train" / FILE_NAME)
    counts = np.full(SHARDS, IMAGENET // SHARDS)
    counts[: IMAGENET % SHARDS] += 1
    shard = np.repeat(np.arange(SHARDS), counts)
    nth = np.arange(IMAGENET) - np.repeat(np.cumsum(counts) - counts, counts)
    tar = shard % len(real.shards)
    replace(
        real,
        shards=tuple(real.shard_path(number % len(real.shards)) for number in range(SHARDS)),
        stamps=("",) * SHARDS,
        sizes=real.sizes[np.arange(SHARDS) % len(real.shards)],
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64),
        samples=real.samples[real.first[tar].astype(np.int64) + nth % real.counts[tar]],
    ).save(path)


def resume_figures(arguments: argparse.Namespace) -> Figures:
    """Seconds on the clock to the first batch of 64."""
    repeats = 1 if SMOKE else 3 if arguments.quick else 7
    results: Figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / FILE_NAME
        imagenet_index(path)
        loading = statistics.median(timed(lambda: ShardIndex.load(path))[0] for _ in range(repeats))
        results["index loaded and verified"] = figure(loading)
        index = ShardIndex.load(path)
        plan = plan_of(IMAGENET, 1024, BATCH)
        skip, first = _webdataset_rate(100 if SMOKE else 5_000 if arguments.quick else 20_000)
        for share in (0.01, 0.5, 0.99):
            step = int(plan.steps_per_epoch * share)
            ours = statistics.median(
                timed(lambda step=step: train_samples(index, plan)[SlotAddress(step, 0)])[0] for _ in range(repeats)
            )
            results[f"resume at {share:.0%}"] = figure(ours, step * plan.global_batch * skip + first)
        for workers in (0, 2):
            config = DataConfig(train="", val="", workers=workers)
            augment = AugmentConfig(crop=CropConfig(size=224))

            def begin(config: DataConfig = config, augment: AugmentConfig = augment) -> None:
                stream = TrainStream(index, plan, config, augment_of(augment, plan), "window", 0, ALONE)
                for _, batches in stream.steps(int(plan.steps_per_epoch * 0.5)):
                    next(batches)
                    return

            begun = statistics.median(timed(begin)[0] for _ in range(1 if arguments.quick else 3))
            results[f"resume at 50%, TrainStream, {workers} workers"] = figure(begun)
    return results


def _webdataset_rate(count: int) -> tuple[float, float]:
    """(seconds per sample skipped, seconds from there to a batch), of the recipe without its decoding."""
    import webdataset as wds

    urls = list(itertools.islice(itertools.cycle(peers.tars(photographs())), SHARDS))
    samples = iter(wds.WebDataset(urls, shardshuffle=100).shuffle(1000))
    next(samples)
    skipping, _ = timed(partial(_drain, itertools.islice, samples, count))
    first, _ = timed(lambda: next(peers.webdataset(photographs(), BATCH)))
    return skipping / count, first


def epoch_figures(arguments: argparse.Namespace) -> Figures:
    """Seconds on the clock for an epoch of Fashion-MNIST, loader workers' start apart."""
    index = ShardIndex.load((few_fashion() if SMOKE else DATA / "fashion_mnist/train") / FILE_NAME)
    tensors = _in_memory(index)
    results: Figures = {}
    for workers in (0, 1):
        times: dict[str, list[float]] = {"ours": [], "torch": []}
        for _ in range(1 if arguments.quick else 3):
            config = DataConfig(train="", val="", channels=1, mean=[0.5], std=[0.5], workers=workers)
            plan = plan_of(len(index), 256, 128)
            stream = TrainStream(
                index, plan, config, Augment(AugmentConfig(flip=0.5), 0, plan, [0.286]), "window", 0, ALONE
            )
            steps = itertools.islice(stream.steps(0), int(plan.steps_per_epoch))
            times["ours"].append(_after_first(batch.images for _, batches in steps for batch in batches))
            loader = DataLoader(tensors, 128, shuffle=True, num_workers=workers)
            times["torch"].append(_after_first(images for images, _ in loader))
        ours, torch_ = (statistics.median(each) for each in times.values())
        results[f"epoch of Fashion-MNIST, {workers} workers"] = figure(ours, torch_)
    return results


def _after_first(batches: Iterator[torch.Tensor]) -> float:
    next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def _in_memory(index: ShardIndex) -> TensorDataset:
    config = DataConfig(train="", val="")
    data = Reader(index, retry=config.retry, cache=config.cache).read(np.arange(len(index)))
    images = torch.stack([decode(each, 1) for each in data if not isinstance(each, Bad)])
    return TensorDataset(images, torch.from_numpy(index.samples["label"].astype(np.int64)))


def parts_figures(arguments: argparse.Namespace) -> Figures:
    seconds = measure_parts(photograph_samples(photographs(), BATCH), 4 if arguments.quick else 16)
    return {part: figure(each) for part, each in seconds.items()}


def main() -> None:
    arguments = parser(__doc__, "fewer rounds")
    arguments.add_argument("--only", default="decode,resume,epoch,parts", help="what to measure, by name")
    arguments.add_argument("--rounds", type=int, help="of decode")
    values = arguments.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(machine())
    figures: Figures = {}
    parts = {
        "decode": ("images/s of CPU time", decode_figures),
        "resume": ("seconds to the first batch", resume_figures),
        "epoch": ("seconds of an epoch", epoch_figures),
        "parts": ("CPU time per image, by part", parts_figures),
    }
    for name in values.only.split(","):
        title, measure = parts[name]
        found = measure(values)
        table(title, found)
        figures |= found
    save(values.json, figures)


if __name__ == "__main__":
    main()
