"""Memory that batches take on their way: what `plan` says against what real loader processes hold."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import message, pack_images
from hosts import missing
from running import ROOT

from dist_trainer.commands.plan import plan_figures, plan_rows
from dist_trainer.config.arguments import new_parser, parse_config
from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.augment import Augment
from dist_trainer.data.batch import Batch
from dist_trainer.distributed.world import World
from dist_trainer.errors import LocalError
from dist_trainer.log.console import Terminal
from dist_trainer.plan import Duration, make_plan
from dist_trainer.run import hand_over as module
from dist_trainer.run.blueprint import make_blueprint
from dist_trainer.run.data import open_data, open_streams
from dist_trainer.run.hand_over import HandOver, hand_over, shared_memory_note

WORKERS = 2
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def config_of(*argv: str) -> TrainConfig:
    given = [
        "--model.name=small_resnet",
        "--model.args={in_channels: 3}",
        "--duration=20step",
        "--wandb.mode=disabled",
        "--lr.peak=0.1",
        *argv,
    ]
    config, _ = parse_config(new_parser("plan", ""), given)
    return config


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    data = pack_images(tmp_path / "data", num_samples=256, num_classes=4, per_shard=128)
    return config_of(
        f"--data.train={data}", f"--data.val={data}", f"--data.workers={WORKERS}", "--batch.global_batch=16",
        "--batch.micro_batch=8", "--augment.crop.size=64", "--eval.batch=12", "--eval.resize=56", "--eval.crop=48",
        f"--run.dir={tmp_path / 'runs'}", "--eval.train_samples=0", "--precise_bn.num_samples=64",
    )  # fmt: skip


def in_shared_memory() -> int:
    """Bytes that torch keeps there for this process and its loader processes."""
    sizes: dict[int, int] = {}
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if "/dev/shm/torch_" in str(descriptor.readlink()):
                    found = descriptor.stat()
                    sizes[found.st_ino] = found.st_size
            except FileNotFoundError:
                continue  # closed meanwhile
    return sum(sizes.values())


def filled() -> int:
    """`in_shared_memory` once nothing is added any more."""
    last, since, deadline = -1, time.monotonic(), time.monotonic() + 60
    while time.monotonic() - since < 1.5 and time.monotonic() < deadline:
        if (now := in_shared_memory()) != last:
            last, since = now, time.monotonic()
        time.sleep(0.05)  # between two looks; it is steady when 1.5 s brought nothing new
    return last


def test_loader_processes_hold_what_the_plan_says(config: TrainConfig) -> None:
    """Full, since nobody takes batches, while one of training and one of an evaluation are in use. By hand: 5 batches
    each, 8 x 3 x 64 x 64 and 12 x 3 x 48 x 48 bytes, here where batch-norm's 8 x 3 x 64 x 64 are more.

    Mutations: forget the batch that is used; one batch ahead per process; leave out the evaluation.
    """
    data = open_data(config, ALONE, Terminal(active=False))
    blueprint = make_blueprint(config, data.train, data.num_classes, 1)
    needs = hand_over(config, blueprint.model, blueprint.augment, data.train, WORKERS)
    assert needs is not None and needs.shared == 5 * (8 * 3 * 64 * 64) * 2
    streams = open_streams(config, data, blueprint.plan, blueprint.augment, ALONE)
    _, batches = next(steps := streams.train.steps(0))
    used: list[Batch] = [next(batches)]
    trains = filled()
    assert streams.bn_samples is not None
    scoring = iter(streams.bn_samples.at(0))
    used.append(next(scoring))
    both = filled()
    assert (trains, both) == (needs.shared // 2, needs.shared)
    used.clear()
    del scoring, steps, batches
    streams.close()


def test_pinned_memory_comes_in_powers_of_two() -> None:
    """By hand, ResNet-50's usual batch: 256 x 3 x 224 x 224 bytes are 36.75 MiB and take 64, as do 256 of evaluation;
    12 in flight with 5 processes. An average on the host is 4 bytes a weight, also rounded up.

    Against plan's figures for the shipped kind of config. Mutations: the batch as it is; without the average.
    """
    argv = ["--data.train=x", "--data.val=x", "--data.workers=5", "--batch.global_batch=256", "--batch.micro_batch=256"]
    sizes = ["--augment.crop.size=224", "--eval.crop=224", "--eval.resize=256", "--eval.batch=256"]
    config = config_of(*argv, *sizes)
    figures = plan_figures(config, "x", gpus=1, num_samples=1_281_167)
    assert figures["pinned_bytes_per_rank"] == 12 * 2 * 64 * 2**20
    assert figures["shared_bytes_per_rank"] == 11 * 2 * 256 * 3 * 224 * 224
    rows, _ = plan_rows(figures)
    assert (
        rows["host memory"].startswith("per rank at most 848 MB of /dev/shm")
        and "1.61 GB pinned" in rows["host memory"]
    )
    averaged = plan_figures(
        config_of(*argv, *sizes, "--ema.decay=0.9", "--ema.device=cpu"), "x", gpus=1, num_samples=1_281_167
    )
    more = averaged["pinned_bytes_per_rank"] - figures["pinned_bytes_per_rank"]
    assert more // 2 < 4 * figures["parameters"] <= more and more & (more - 1) == 0


def test_where_no_size_is_known_nothing_is_claimed() -> None:
    config = config_of(
        "--data.train=x", "--data.val=x", "--batch.global_batch=16", "--batch.micro_batch=16", "--augment.crop=null"
    )
    plan = make_plan(config.batch, Duration.parse("1ep", "duration"), world=1, num_samples=160)
    augment = Augment(config.augment, 0, plan, [0.5] * 3)
    assert hand_over(config, torch.nn.Linear(1, 1), augment, 160, 2) is None


@pytest.mark.parametrize(
    ("total", "free", "said"),
    [
        (64e6, 64e6, "has 64 MB: enlarge it"),
        (2e9, 1e9, "up to 1.54 GB, and 1 GB are free: "),
        (2e9, 1.9e9, None),
    ],
)
def test_too_little_is_told_at_the_start(
    total: float, free: float, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker's 64 MB for two ranks of 10 processes and 38.5 MB a batch: refused. Less free than may be needed: warned.

    Mutations: one rank's need for a host's; refuse for what may never be needed at once.
    """
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: (total, total - free, free))
    needs, config = (
        HandOver(shared=770_000_000, shared_at_once=385_000_000, pinned=0),
        config_of("--data.train=x", "--data.val=x", "--data.workers=10", "--batch.global_batch=16"),
    )
    world = replace(ALONE, size=2, local_size=2)
    if total < 1e9:
        with pytest.raises(LocalError) as caught:
            shared_memory_note(needs, config, world)
        line = message(caught)
    else:
        line = shared_memory_note(needs, config, world) or ""
    assert (said or "") in line and bool(line) == (said is not None)
    if line:
        assert line.startswith("data.workers: 10 loader processes of each of 2 ranks hand over batches through /dev")
    assert shared_memory_note(needs, config, replace(world, local_rank=1)) is None, "one rank of a host says it"


@pytest.mark.skipif(bool(missing()), reason=missing() or "they are there")
def test_a_small_shared_memory_ends_the_run_before_a_step(config: TrainConfig, tmp_path: Path) -> None:
    """A real /dev/shm of 64 kB, as in a container: one line, status 2, no run folder. Without it, a bus error later."""
    data = config.data.train
    train = [
        sys.executable, "-m", "dist_trainer", "train", f"--data.train={data}", f"--data.val={data}",
        f"--data.workers={WORKERS}", "--batch.global_batch=8", "--batch.micro_batch=8", "--augment.crop.size=64",
        "--eval.crop=48",
        "--duration=4step", "--lr.peak=0.1", "--model.name=small_resnet",
        "--model.args={in_channels: 3}", "--wandb.mode=disabled",
        f"--run.dir={tmp_path / 'runs'}", "--run.name=run",
    ]  # fmt: skip
    mounted = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    command = [shutil.which("unshare") or "unshare", "-m", "bash", "-c", mounted, "_", *train]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("dist-trainer: data.workers: 2 loader processes of each of 1 ")
    assert not (tmp_path / "runs" / "run").exists()
