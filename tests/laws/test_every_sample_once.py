"""The data layer under real ranks: uneven shards, all tails and orders, bad samples, a kill, storage that goes away.

300 samples in 24 shards of 1 to 24 samples: most shards are smaller than a block, and 300 is no multiple of 64.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import flip_byte, labelled, write_tar
from running import TINY, Session, metrics, newest, run_jobs, run_killed_jobs, tensors, torchrun, wait_for_step
from s3_server import CREDENTIALS, S3Server

from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.shards.prepare import prepare_index

TOLERANCE = 2e-6  # as in test_worlds.py: the order of float sums over 12 steps
NUM_SAMPLES, STEPS = 300, 12
BROKEN, FLIPPED = 17, 123  # does not decode; other bytes than indexed
VARIANTS = {
    "mask": [],
    "carry": ["--data.tail=carry"],
    "drop": ["--data.tail=drop"],
    "repeats": ["--augment.repeats=2"],
    "full": ["--data.order=full"],
    "balanced": ["--data.order=balanced"],
    "stages": ["--data.stages=[tiny:seen_by_webdataset]"],
}


def make_tars(folder: Path, broken: int | None = None) -> Path:
    folder.mkdir()
    rng, first = np.random.default_rng(0), 0
    for number in range(1, 25):
        write_tar(folder / f"{number:02d}.tar", labelled(rng, first, number, broken))
        first += number
    assert first == NUM_SAMPLES
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train, val, and both with bad samples in them, indexed."""
    folder = tmp_path_factory.mktemp("sets")
    make_tars(folder / "train")
    make_tars(folder / "bad", BROKEN)
    for name, broken in (("val", None), ("bad_val", 50)):
        (folder / name).mkdir()
        write_tar(folder / name / "0.tar", labelled(np.random.default_rng(1), 0, 101, broken))
    for name in ("train", "bad", "val", "bad_val"):
        prepare_index("data.train", str(folder / name))
    index = ShardIndex.load(folder / "bad" / FILE_NAME)
    shard = int(index.shard_of(np.array([FLIPPED]))[0])
    tar = Path(index.shard_path(shard))
    before = tar.stat()
    flip_byte(tar, int(index.samples["offset"][FLIPPED]) + 70)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a failing disk does: unnoticed when it starts
    return folder


def argv_of(sets: Path, train: str = "train", val: str = "val") -> list[str]:
    changed = [word for word in TINY if not word.startswith(("--duration", "--eval.batch"))]
    return [
        *changed, f"--data.train={sets / train}", f"--data.val={sets / val}", f"--duration={STEPS}step",
        "--eval.batch=16", "--eval.train_samples=50",
        "--augment.transforms=[{name: RandomRotation, args: {degrees: 20}}]",
        "--augment.crop={size: 28}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, sets: Path) -> Path:
    """Three starts: worlds 1, 3 and 2, with 3, 0 and 1 loader workers."""
    folder = tmp_path_factory.mktemp("runs")
    argv, bad = argv_of(sets), argv_of(sets, "bad", "bad_val")
    variants = {name: [*argv, *more] for name, more in VARIANTS.items()}
    run_jobs(1, [
        *({"name": f"{name}-1", "argv": each, "record": True} for name, each in variants.items()),
        {"name": "workers-1", "argv": [*argv, "--data.workers=3"], "record": True},
        {"name": "bad-1", "argv": bad, "record": True},
    ], folder)  # fmt: skip
    run_jobs(3, [
        *({"name": f"{name}-3", "argv": each, "record": True} for name, each in variants.items()),
        {"name": "bad-3", "argv": bad, "record": True},
        {"name": "eval_fail", "argv": [*bad, "--eval.bad=fail"], "fails": True},
        {"name": "late", "argv": argv, "late": True},
    ], folder)  # fmt: skip
    killed = [*argv, "--checkpoint.every=1step"]
    run_jobs(2, [{"name": "workers-2", "argv": [*argv, "--data.workers=1"], "record": True}], folder)
    run_killed_jobs(2, [{"name": "killed", "argv": killed, "record": True, "kill_at": 7}], folder)
    for file in folder.glob("killed-rank*.json"):
        file.rename(folder / f"before-{file.name}")
    run_jobs(3, [{"name": "killed", "argv": killed, "record": True}], folder)
    return folder


def record(runs: Path, name: str) -> dict[tuple[int, int], dict[str, Any]]:
    """What stood in each (step, slot), from all ranks; each slot was run by one."""
    entries = [e for file in runs.glob(f"{name}-rank*.json") for e in json.loads(file.read_text()) if not e["ghost"]]
    found = {(e["step"], e["slot"]): {key: e[key] for key in ("ids", "weight", "pixels")} for e in entries}
    assert len(found) == len(entries) > 0
    return found


def counted(slots: dict[tuple[int, int], dict[str, Any]], steps: range) -> Counter[int]:
    """How often each sample counted in these steps."""
    return Counter(
        i for (step, _), e in slots.items() if step in steps for i, w in zip(e["ids"], e["weight"], strict=True) if w
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_slots_hold_the_same_pixels_on_one_rank_and_on_three(runs: Path, name: str) -> None:
    """ids, weights and augmented pixels, slot by slot; losses and weights to rounding; all steps done on every rank.

    So uneven shards hang no collective, and each tail is exact. Fails when a draw depends on rank or world.
    """
    assert record(runs, f"{name}-1") == record(runs, f"{name}-3")
    one, three = metrics(runs / f"{name}-1", "train/loss"), metrics(runs / f"{name}-3", "train/loss")
    assert len(one) == len(three) == STEPS
    assert all(abs(a - b) < TOLERANCE for a, b in zip(one, three, strict=True))
    ours, theirs = tensors(runs / f"{name}-1"), tensors(runs / f"{name}-3")
    assert all((ours[key].float() - theirs[key].float()).abs().max() < TOLERANCE for key in ours)
    for metric in ("val/top1", "val/top5"):
        assert metrics(runs / f"{name}-1", metric) == metrics(runs / f"{name}-3", metric)


def test_loader_workers_change_nothing(runs: Path) -> None:
    """Three on one rank, one on each of two, none: the same slots. Fails when a worker has random state of its own."""
    assert record(runs, "workers-1") == record(runs, "mask-1")
    assert record(runs, "workers-2") == record(runs, "mask-1")
    ours, theirs = tensors(runs / "workers-1"), tensors(runs / "mask-1")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_epoch_is_every_sample_once_or_what_its_tail_and_order_say(runs: Path, sets: Path) -> None:
    """Counted from what the ranks ran. Fails when a tail or an order is not the one that the config names."""
    everyone = Counter(range(NUM_SAMPLES))
    for name in ("mask", "full"):
        slots = record(runs, f"{name}-1")
        assert counted(slots, range(5)) == counted(slots, range(5, 10)) == everyone
    carried = counted(record(runs, "carry-1"), range(STEPS))
    assert carried.total() == STEPS * 64
    assert set(carried.values()) == {2, 3}  # 768 = 2 * 300 + 168
    assert set(counted(record(runs, "drop-1"), range(4)).values()) == {1}
    assert counted(record(runs, "drop-1"), range(4)).total() == 256
    repeated = record(runs, "repeats-1")
    assert counted(repeated, range(5)) == Counter(dict.fromkeys(counted(repeated, range(5)), 2))
    assert counted(repeated, range(5)).total() == NUM_SAMPLES
    copies = [(repeated[step, slot], repeated[step, slot + 2]) for step in range(4) for slot in range(2)]
    assert all(a["ids"] == b["ids"] and a["pixels"] != b["pixels"] for a, b in copies)
    labels = ShardIndex.load(sets / "train" / FILE_NAME).samples["label"]
    balanced = counted(record(runs, "balanced-1"), range(5))
    per_class = Counter(dict.fromkeys(range(7), 0))
    for sample, times in balanced.items():
        per_class[int(labels[sample])] += times
    assert set(per_class.values()) == {NUM_SAMPLES // 7}


def test_stages_run_under_webdataset_with_random_numbers_of_the_sample(runs: Path) -> None:
    """The stage adds a random amount from Python's, NumPy's and torch's generators: other pixels, on every world alike.

    Fails when stages are not run, or not seeded.
    """
    plain, staged = record(runs, "mask-1"), record(runs, "stages-1")
    assert all(plain[place]["ids"] == staged[place]["ids"] for place in plain)
    assert all(plain[place]["pixels"] != staged[place]["pixels"] for place in plain)


def test_killed_in_mid_epoch_and_resumed_on_another_world_loses_and_repeats_nothing(runs: Path) -> None:
    """SIGKILL to a rank of 2 in step 7; 3 ranks go on from step 7: together, each slot is as in the undisturbed run.

    Fails when a restart depends on what loaders had fetched ahead, or counts from a rank's share.
    """
    before, after = record(runs, "before-killed"), record(runs, "killed")
    assert min(step for step, _ in after) == 7
    first = {place: entry for place, entry in before.items() if place[0] < 7}
    assert {**first, **after} == record(runs, "mask-1")
    assert set(first).isdisjoint(after)


def test_bad_samples_keep_their_place_count_nothing_and_are_listed_once(runs: Path, sets: Path) -> None:
    """A flipped byte and an image that does not decode: weight 0 in their slot, one line each, on 1 rank and on 3.

    All other ids are those of a set without bad samples. Validation counts its own as wrong. Fails when a bad sample
    is dropped, counts, is listed per epoch or per rank, or leaves validation's denominator.
    """
    good, bad = record(runs, "mask-1"), record(runs, "bad-1")
    assert bad == record(runs, "bad-3")
    for place, entry in bad.items():
        assert entry["ids"] == good[place]["ids"]
        weights = zip(entry["ids"], good[place]["weight"], strict=True)
        assert entry["weight"] == [0.0 if i in (BROKEN, FLIPPED) else w for i, w in weights]
    for world in (1, 3):
        run = runs / f"bad-{world}"
        lines = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
        listed = sorted((line["split"], line["sample"], line["kind"]) for line in lines)
        assert listed == [("train", BROKEN, "decode"), ("train", FLIPPED, "crc"), ("val", 50, "decode")]
        assert metrics(run, "data/bad")[-1] == 2
        assert json.loads((run / "summary.json").read_text())["bad_samples"] == 2
        assert (metrics(run, "val/top1")[-1] * 101) % 1 == pytest.approx(0, abs=1e-9)
    ones, threes = metrics(runs / "bad-1", "train/loss"), metrics(runs / "bad-3", "train/loss")
    assert all(abs(a - b) < TOLERANCE for a, b in zip(ones, threes, strict=True))


def test_a_validation_set_that_cannot_be_scored_costs_no_training(runs: Path) -> None:
    """All ranks say the same; the steps are saved, the run is stopped. Fails when validation comes before saving."""
    said = {(runs / f"eval_fail-rank{rank}.txt").read_text() for rank in range(3)}
    assert len(said) == 1
    assert (
        f"stopped after step {STEPS}, saved; start again to continue: eval.bad: fail: 1 bad validation sample"
        in said.pop()
    )
    assert newest(runs / "eval_fail").name == f"step_{STEPS:08d}"
    assert (runs / "eval_fail" / "STATE").read_text() == "mistake\n"


def test_work_of_rank_0_may_take_longer_than_collectives_wait(runs: Path) -> None:
    """5 s of it, in a group whose collectives end after 2 s: so a large set can be indexed. Fails without the beats."""
    assert [(runs / f"late-rank{rank}.txt").read_text() for rank in range(3)] == ["done"] * 3


def test_over_the_budget_all_ranks_stop_and_a_larger_one_goes_on(sets: Path, runs: Path, tmp_path: Path) -> None:
    """One line that names count, budget, shards and command; saved; with a larger budget the end is that of bad-3.

    Fails when a rank goes on alone (then the others hang), or the line comes from every rank.
    """
    argv = ["-m", "dist_trainer", "train", *argv_of(sets, "bad", "bad_val"), f"--run.dir={tmp_path}", "--run.name=run"]
    session = Session(torchrun(2, *argv, "--data.max_bad=1"), tmp_path / "log")
    assert session.wait(120) != 0
    said = [line for line in session.log.read_text().splitlines() if line.startswith("dist-trainer: ")]
    assert len(said) == 1, said
    assert "2 bad samples, over the budget of 1 (data.max_bad): 1 " in said[0]
    assert f"Run: dist-trainer shards check {sets / 'bad' / FILE_NAME}" in said[0]
    assert not session.left_after(15)
    stopped = int(newest(tmp_path / "run").name.removeprefix("step_"))
    assert 0 < stopped < STEPS
    session = Session(torchrun(2, *argv), tmp_path / "log2")
    assert session.wait(120) == 0, session.log.read_text()[-3000:]
    ours, theirs = tensors(tmp_path / "run"), tensors(runs / "bad-3")
    assert all((ours[key].float() - theirs[key].float()).abs().max() < TOLERANCE for key in ours)


@pytest.mark.slow  # half a minute of waiting; test_samples.py has the same for one rank
def test_storage_that_stays_away_stops_all_ranks_and_loses_no_step(
    sets: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training from S3; then every request fails. The step is not taken, saved, and done again when storage is back.

    The end is that of the same samples read from disk. Fails when missing data are masked, or the step counts.
    """
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = S3Server()
    index = ShardIndex.load(sets / "train" / FILE_NAME)
    server.upload("bucket", *(Path(index.shard_path(n)) for n in range(24)), sets / "train" / FILE_NAME, under="train/")
    argv = [word for word in argv_of(sets) if not word.startswith("--data.train")]
    argv = [
        "-m", "dist_trainer", "train", *argv, "--data.train=s3://bucket/train", "--data.workers=1",
        f"--data.storage_options={json.dumps(server.options)}", f"--data.cache={{dir: {tmp_path}/cache}}",
        "--data.retry={timeout: 2, deadline: 3}", f"--run.dir={tmp_path}", "--run.name=run", "--data.order=full",
        "--checkpoint.every=null",
    ]  # fmt: skip
    session = Session(torchrun(2, *argv, "--data.cache.size=1KB"), tmp_path / "log")
    wait_for_step(session, tmp_path / "run", 3)
    server.faults = 10**9
    assert session.wait(120) != 0
    said = [line for line in session.log.read_text().splitlines() if "dist-trainer: stopped after step" in line]
    assert len(said) == 1, session.log.read_text()[-3000:]
    assert "s3://bucket/train/" in said[0]
    assert not session.left_after(15)
    server.faults = 0
    session = Session(torchrun(2, *argv), tmp_path / "log2")
    assert session.wait(120) == 0, session.log.read_text()[-3000:]
    server.stop()
    losses, undisturbed = metrics(tmp_path / "run", "train/loss"), metrics(runs / "full-3", "train/loss")
    assert all(abs(a - b) < TOLERANCE for a, b in zip(losses, undisturbed, strict=True))
    ours, theirs = tensors(tmp_path / "run"), tensors(runs / "full-3")
    assert all((ours[key].float() - theirs[key].float()).abs().max() < TOLERANCE for key in ours)
