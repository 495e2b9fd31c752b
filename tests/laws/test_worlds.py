"""One run on 1, 2, 3 and 4 ranks, at ZeRO 0 to 3 and on torch's DDP: the same samples, losses, weights, statistics.

Tolerances: the runs differ in the order in which float32 numbers are added, so each step may differ by a few units of
2**-24 = 6e-8. The network has no kink that could turn a rounding error into another branch; 20 steps of at most a few
6e-8 each, on values of order 1, stay below TOLERANCE. Within one world nothing may differ at all.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from running import POOLS, TINY, metrics, newest, run_jobs, tensors

from dist_trainer.engine.base import EngineConfig
from dist_trainer.engine.zero import deepspeed_config
from dist_trainer.plan import BatchConfig, Duration, make_plan

TOLERANCE = 2e-6
STAGES = ("zero0", "zero1", "zero2", "zero3", "torch")


def engine(name: str) -> list[str]:
    return ["--engine.backend=torch"] if name == "torch" else [f"--engine.zero={name[-1]}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, fashion: list[str], whole_fashion: list[str]) -> Path:
    """Every run of this file: one start of the ranks per world. Elastic and chained runs go on from start to start."""
    folder = tmp_path_factory.mktemp("worlds")
    argv, scored = [*TINY, *fashion], [*TINY, *whole_fashion]
    poison = ["--model.args={poison: [6, 1]}"]
    watched = ["--checkpoint.every=1step", "--checkpoint.keep_last=30"]
    scaled = ["--loss.name=tiny:Scaled", "--loss.args={factor: 100}", "--loss.label_smoothing=0", "--lr.peak=0.001"]
    mixed = ["--mixing.mixup=0.4", "--mixing.cutmix=1", "--mixing.off_last=4step", "--loss.name=bce",
             "--loss.args={target_threshold: 0.2, sum_classes: true}"]  # fmt: skip
    run_jobs(1, [
        {"name": "world1", "argv": argv, "record": True},
        {"name": "elastic", "argv": argv, "stop_at": 4},
        {"name": "mixed1", "argv": [*argv, *mixed]},
    ], folder)  # fmt: skip
    weights = str(newest(folder / "world1"))
    run_jobs(3, [
        {"name": "world3", "argv": argv, "record": True},
        {"name": "world3-resumed", "argv": argv, "stop_at": 8},
        {"name": "world3-resumed", "argv": argv},
        {"name": "world3-zero3", "argv": [*argv, "--engine.zero=3"]},
        {"name": "mixed3", "argv": [*argv, *mixed]},
        {"name": "elastic", "argv": [*argv, "--engine.zero=3"], "stop_at": 9, "stop_rank": 2},
        {"name": "eval3", "argv": scored, "eval": weights},
    ], folder)  # fmt: skip
    run_jobs(2, [
        {"name": "zero0", "argv": argv, "record": True},
        *({"name": name, "argv": [*argv, *engine(name)]} for name in STAGES[1:]),
        {"name": "saved-often", "argv": [*argv, "--checkpoint.every=3step", "--log.every=7step", "--eval.every=6step"]},
        *({"name": f"bf16-{name}", "argv": [*argv, *engine(name), "--engine.precision=bf16"]} for name in STAGES),
        *({"name": f"scaled-{name}", "argv": [*argv, *engine(name), *scaled]} for name in STAGES),
        *({"name": f"clipped-{name}", "argv": [*argv, *engine(name), *scaled, "--engine.clip_grad_norm=0.5"]}
          for name in STAGES),
        *({"name": f"poisoned-{name}", "argv": [*argv, *engine(name), *poison, *watched]} for name in STAGES),
        {"name": "poisoned-unwatched", "argv": [*argv, *poison, "--log.every=20step"]},
        *({"name": "chain", "argv": [*argv, *engine(name)], "stop_at": 3 + 4 * n, "stop_rank": n % 2}
          for n, name in enumerate(STAGES[:4])),
        {"name": "chain", "argv": argv},
        {"name": "elastic", "argv": [*argv, "--engine.zero=1"], "stop_at": 14},
        {"name": "mixed2", "argv": [*argv, *mixed]},
        {"name": "mixed2-resumed", "argv": [*argv, *mixed], "stop_at": 7},
        {"name": "mixed2-resumed", "argv": [*argv, *mixed]},
        {"name": "eval2", "argv": scored, "eval": weights},
    ], folder)  # fmt: skip
    run_jobs(4, [
        {"name": "world4", "argv": argv, "record": True},
        {"name": "elastic", "argv": argv},
        {"name": "eval4", "argv": scored, "eval": weights},
    ], folder)  # fmt: skip
    run_jobs(1, [{"name": "eval1", "argv": scored, "eval": weights}], folder)
    return folder


def furthest(a: Path, b: Path, name: str = "model") -> float:
    """The largest difference between two runs' final tensors."""
    first, second = tensors(a, name), tensors(b, name)
    assert first.keys() == second.keys()
    # NaN would pass every comparison below.
    assert all(bool(value.isfinite().all()) for state in (first, second) for value in state.values())
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


def slots(runs: Path, name: str, world: int) -> dict[tuple[int, int], tuple[list[int], list[float], int]]:
    """(step, slot) -> (ids, weights, sum of pixels) over all ranks, ghosts left out; every slot exactly once."""
    found = {}
    for rank in range(world):
        for seen in json.loads((runs / f"{name}-rank{rank}.json").read_text()):
            if not seen["ghost"]:
                assert (seen["step"], seen["slot"]) not in found
                found[seen["step"], seen["slot"]] = (seen["ids"], seen["weight"], seen["pixels"])
    return found


def test_every_world_sees_the_same_samples_in_the_same_slots(runs: Path) -> None:
    """1 x 4, 2 x 2, 4 x 1, 3 ranks (1, 1, 2): equal ids, weights, augmented pixels. Mutation: add rank to a key."""
    one = slots(runs, "world1", 1)
    assert len(one) == 20 * 4
    for name, world in (("zero0", 2), ("world3", 3), ("world4", 4)):
        assert slots(runs, name, world) == one


def test_three_ranks_go_on_bit_for_bit(runs: Path) -> None:
    """From three ranks on, sums depend on their order. Mutation: let DDP order its buckets in the first step."""
    assert furthest(runs / "world3", runs / "world3-resumed") == 0
    assert furthest(runs / "world3", runs / "world3-resumed", "optim") == 0


def test_uneven_ranks_run_equally_many_forwards(runs: Path) -> None:
    """Of 3 ranks and 4 slots, each runs 2 forwards a step. Mutation: skip ghosts (ZeRO 3 then hangs)."""
    counts = [len(json.loads((runs / f"world3-rank{rank}.json").read_text())) for rank in range(3)]
    assert counts == [40, 40, 40]


@pytest.mark.parametrize("name", ["zero0", "world3", "world3-zero3", "world4"])
def test_losses_weights_and_bn_statistics_do_not_depend_on_the_world(runs: Path, name: str) -> None:
    """Mutations: average BN over ranks instead of slots; drop the factor W of the loss; let ghosts count."""
    one, other = metrics(runs / "world1", "train/loss"), metrics(runs / name, "train/loss")
    assert len(one) == 20
    assert all(abs(a - b) < TOLERANCE for a, b in zip(one, other, strict=True))
    assert furthest(runs / "world1", runs / name) < TOLERANCE
    assert furthest(runs / "world1", runs / name, "optim") < TOLERANCE


@pytest.mark.parametrize("name", ["mixed2", "mixed3"])
def test_mixing_does_not_depend_on_the_world(runs: Path, name: str) -> None:
    """Mixup, CutMix and a loss that is not linear in its targets, until four steps before the end.

    Mutations: draw by rank, or by the number of draws so far.
    """
    one, other = metrics(runs / "mixed1", "train/loss"), metrics(runs / name, "train/loss")
    assert len(one) == 20
    assert all(abs(a - b) < TOLERANCE for a, b in zip(one, other, strict=True))
    assert furthest(runs / "mixed1", runs / name) < TOLERANCE


def test_a_resumed_run_mixes_as_the_one_that_was_not_stopped(runs: Path) -> None:
    """Bit for bit. Mutation: a generator that lives as long as the process."""
    assert metrics(runs / "mixed2-resumed", "train/loss") == metrics(runs / "mixed2", "train/loss")
    assert furthest(runs / "mixed2-resumed", runs / "mixed2") == 0


def test_weights_really_move(runs: Path) -> None:
    """The laws above are about something: the loss falls and batch-norm's statistics leave their start."""
    losses, state = metrics(runs / "world1", "train/loss"), tensors(runs / "world1")
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.2
    assert float((state["bn1.running_mean"]).abs().max()) > 0.01


@pytest.mark.parametrize("name", STAGES[1:])
@pytest.mark.parametrize("kind", ["", "bf16-", "scaled-", "clipped-"])
def test_zero_stages_and_torch_give_the_same_run(runs: Path, kind: str, name: str) -> None:
    """20 steps at ZeRO 1, 2, 3 and on DDP against ZeRO 0: fp32, bf16, gradients of norm far above 1, clipped.

    Mutations: leave out `gradient_clipping` (its default is 1.0: scaled- fails); drop `lower_precision_safe_modules`
    (bf16- fails above stage 0); scale the loss by the accumulation twice.
    """
    a, b = metrics(runs / f"{kind}zero0", "train/loss"), metrics(runs / f"{kind}{name}", "train/loss")
    scale = max(abs(x) for x in a)
    assert all(abs(x - y) < TOLERANCE * scale for x, y in zip(a, b, strict=True))
    assert furthest(runs / f"{kind}zero0", runs / f"{kind}{name}") < TOLERANCE
    norms = [metrics(runs / f"{kind}{n}", "train/grad_norm") for n in ("zero0", name)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert not kind.startswith(("scaled", "clipped")) or min(norms[0]) > 5


def test_clipping_clips(runs: Path) -> None:
    """Mutation: ignore clip_grad_norm."""
    assert furthest(runs / "scaled-zero0", runs / "clipped-zero0") > 1e-3


@pytest.mark.parametrize("name", STAGES)
def test_a_step_that_is_not_finite_changes_nothing_anywhere(runs: Path, name: str) -> None:
    """NaN on one rank in step 3: weights, momentum and BN statistics stay bit for bit; training goes on, clean.

    Mutation: step without the finite check (stage 0 then fills the weights with NaN).
    """
    run = runs / f"poisoned-{name}"
    before, after, later = (run / "checkpoints" / f"step_{n:08d}" for n in (3, 4, 5))
    for file in ("model", "optim"):
        same = [tensors_of(folder, file) for folder in (before, after)]
        assert all(torch.equal(same[0][key], same[1][key]) for key in same[0])
    moved = tensors_of(later, "model")
    assert not torch.equal(moved["fc.weight"], tensors_of(after, "model")["fc.weight"])
    assert metrics(run, "train/skipped")[2:5] == [0, 1, 1]
    assert all(bool(value.isfinite().all()) for value in tensors(run).values())
    losses = metrics(run, "train/loss")
    assert losses.pop(3) is None, "a skipped step has no loss"
    assert all(math.isfinite(loss) for loss in losses)


def test_a_skipped_step_leaves_nothing_behind_that_a_save_would_clean(runs: Path) -> None:
    """The same run, not saved or logged until its end. Mutation: no `publish` after a skipped step: NaN stays."""
    assert furthest(runs / "poisoned-zero0", runs / "poisoned-unwatched") == 0


def tensors_of(folder: Path, file: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / f"{file}.safetensors")


def test_saving_logging_and_evaluating_do_not_change_a_run(runs: Path) -> None:
    """Bit for bit. Mutation: leave the published statistics as a layer's average instead of momentum 1."""
    assert furthest(runs / "zero0", runs / "saved-often") == 0
    assert furthest(runs / "zero0", runs / "saved-often", "optim") == 0


def test_a_run_handed_from_stage_to_stage_is_the_run_that_was_not(runs: Path) -> None:
    """Stopped four times, on either rank, and resumed at ZeRO 1, 2, 3 and 0: bit for bit, its log too.

    Mutations: do not relink momentum of the second group (stages 1, 2); forget the padding of the last partition
    (stage 3); do not save the meter.
    """
    assert furthest(runs / "zero0", runs / "chain") == 0
    assert furthest(runs / "zero0", runs / "chain", "optim") == 0
    assert metrics(runs / "chain", "train/loss") == metrics(runs / "zero0", "train/loss")
    assert metrics(runs / "chain", "step") == [*range(1, 21), 20, 20]  # validation, training samples


def test_a_run_handed_from_world_to_world_is_the_same_run(runs: Path) -> None:
    """1 rank, then 3 (ZeRO 3), 2 (ZeRO 1), 4. Mutation: derive the slot from the rank's own step count."""
    assert metrics(runs / "elastic", "train/loss") == pytest.approx(
        metrics(runs / "world1", "train/loss"), abs=TOLERANCE
    )
    assert furthest(runs / "world1", runs / "elastic") < TOLERANCE


def test_validation_counts_are_the_same_integers_on_every_world(runs: Path) -> None:
    """One checkpoint on 1, 2, 3 and 4 ranks: 10,000 of 10,000. Mutation: pad by repetition without weight 0."""
    results = [json.loads((runs / f"eval{world}.json").read_text()) for world in (1, 2, 3, 4)]
    counts = [(r["correct1"], r["correct5"], r["num_samples"]) for r in results]
    assert counts[0][2] == 10_000 and 0 < counts[0][0] < counts[0][1] < 10_000
    assert counts == [counts[0]] * 4


def test_deepspeed_builds_no_extension(runs: Path) -> None:
    """Its 44-second C++ build for inference is never started. Mutation: drop no_inference_kernels()."""
    assert POOLS[2].session.process.poll() is None
    assert not any(list(pool.extensions.rglob("*")) for pool in POOLS.values())


def test_deepspeed_is_told_exactly_this() -> None:
    """A change here is a change of every run: read engine.py's docstring before you edit."""
    plan = make_plan(
        BatchConfig(global_batch=64, micro_batch=16), Duration.parse("1ep", "duration"), world=2, num_samples=640
    )
    assert deepspeed_config(EngineConfig(zero=0, precision="bf16", clip_grad_norm=2.0), plan) == {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": 0, "reduce_bucket_size": 6_553_600},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    assert deepspeed_config(EngineConfig(zero=2, precision="fp32", clip_grad_norm=2.0), plan) == {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 2.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 6_553_600},
    }
