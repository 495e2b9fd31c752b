"""EMA, PreciseBN and weight averaging under real ranks: closed forms, worlds, stages, kills; training untouched."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import labelled, write_tar
from running import TINY, Session, metrics, newest, run_jobs, run_killed_jobs, tensors
from safetensors.torch import load_file

from dist_trainer.shards.prepare import prepare_index

TOLERANCE = 2e-6  # as in test_worlds.py: the order of float sums over 20 steps
STEPS, K = 20, 3
# One of each ramp, stage and precision; every one also skips a step.
EMAS = {
    "constant-zero0": ["--ema.decay=0.9"],
    "threshold-zero1": ["--ema.decay=0.7", "--ema.ramp=threshold", "--engine.zero=1"],
    "exponential-zero2": ["--ema.decay=0.9", "--ema.ramp=exponential", "--engine.zero=2"],
    "started-zero3": ["--ema.decay=0.8", "--ema.start=5step", "--engine.zero=3"],
    "every-host-bf16": ["--ema.decay=0.9", "--ema.every=3", "--ema.device=cpu", "--engine.precision=bf16"],
    "bf16-zero3": ["--ema.decay=0.9", "--engine.zero=3", "--engine.precision=bf16"],
}
SKIPPED = 4  # the step of the fifth forward on rank 0: two micro-batches a step there, and steps count from 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Starts of 2, 1 and 4 ranks."""
    folder = tmp_path_factory.mktemp("weights")
    for name, count in (("train", 300), ("val", 101)):
        (folder / name).mkdir()
        write_tar(folder / name / "0.tar", labelled(np.random.default_rng(count), 0, count))
        prepare_index("data.train", str(folder / name))
    argv = [word for word in TINY if not word.startswith("--eval.")]
    argv += [f"--data.train={folder / 'train'}", f"--data.val={folder / 'val'}", "--eval.batch=40"]
    off = [*argv, "--eval.every=4step"]
    on = [
        *off, "--ema.decay=0.9", "--precise_bn.num_samples=120", f"--averaging.top_k={K}",
        "--augment.crop={size: 28}", "--augment.flip=0.5",
    ]  # fmt: skip
    off += on[-2:]
    poison = [f"--model.args={{poison: [{2 * SKIPPED}, 0]}}", "--eval.every=null"]
    run_jobs(2, [
        {"name": "on", "argv": on},
        {"name": "off", "argv": off},
        {"name": "on-zero3", "argv": [*on, "--engine.zero=3", "--checkpoint.every=4step"]},
        {"name": "off-zero3", "argv": [*off, "--engine.zero=3"]},
        *({"name": name, "argv": [*argv, *poison, *more], "weights": True} for name, more in EMAS.items()),
        {"name": "halves", "argv": on, "stop_at": 7},
        {"name": "greedy", "argv": [*on, "--averaging.greedy=true", "--averaging.metric=val/loss"]},
    ], folder)  # fmt: skip
    checkpoint = str(newest(folder / "on"))
    run_jobs(1, [
        {"name": "on-1", "argv": on},
        {"name": "halves", "argv": [*on, "--engine.zero=3"]},
        *({"name": f"eval-{name}", "argv": on, "eval": checkpoint, "of": name} for name in SCORED),
        {"name": "eval-average_bn", "argv": on, "eval": str(next((folder / "on" / "average").glob("step_*")))},
    ], folder)  # fmt: skip
    run_jobs(4, [{"name": "on-4", "argv": on}], folder)
    return folder


SCORED = {"model": "val", "model_bn": "val_bn", "ema": "val_ema", "ema_bn": "val_ema_bn"}


def ema_by_hand(folder: Path, decay_of: Any, start: int = 0, every: int = 1) -> dict[str, torch.Tensor]:
    """float64, from the weights that were logged after each step; those of a step that was not applied do not count."""
    files = sorted(folder.iterdir())
    applied = [load_file(file) for file in files if file.stem.endswith("-1")]
    assert [file.stem for file in files if file.stem.endswith("-0")] == [f"{SKIPPED:04d}-0"]
    average: dict[str, torch.Tensor] = {}
    if start:
        average = {name: value.double() for name, value in applied[start - 1].items()}
    else:  # lr is 0 at step 0, so its weights are the first ones
        average = {name: value.double() for name, value in applied[0].items()}
    for s, state in enumerate(applied[start:]):
        if (s + 1) % every == 0:
            decay = decay_of(s, STEPS - start) ** every
            average = {name: decay * value + (1 - decay) * state[name].double() for name, value in average.items()}
    return average


@pytest.mark.parametrize(
    ("name", "decay_of", "start", "every"),
    [
        ("constant-zero0", lambda s, total: 0.9, 0, 1),
        ("threshold-zero1", lambda s, total: min(0.7, (1 + s) / (10 + s)), 0, 1),
        ("exponential-zero2", lambda s, total: 0.9 * (1 - math.exp(-15 * s / total)), 0, 1),
        ("started-zero3", lambda s, total: 0.8, 5, 1),
        ("every-host-bf16", lambda s, total: 0.9, 0, 3),
        ("bf16-zero3", lambda s, total: 0.9, 0, 1),
    ],
)
def test_the_average_is_the_closed_form_of_the_logged_weights(
    runs: Path, name: str, decay_of: Any, start: int, every: int
) -> None:
    """At each ZeRO stage and precision, over the applied steps alone, kept in float32.

    2e-7: float32 rounds 20 updates of values below 1; variances are up to 3. Fails when a skipped step counts, when a
    stage averages something else than its float32 weights, or a rank's piece is put together wrongly.
    """
    expected = ema_by_hand(runs / f"{name}-weights", decay_of, start, every)
    found = tensors(runs / name, "ema")
    assert expected.keys() <= found.keys()
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        assert (found[key].double() - value).abs().max() < 2e-7 * max(1.0, float(value.abs().max())), key
    assert metrics(runs / name, "train/skipped")[-1] == 1
    # Batch-norm's statistics, which are known one step later, go the same way.
    first, *rows = load_file(runs / f"{name}-weights-statistics.safetensors")["running"].double()
    assert len(rows) == STEPS - 1
    statistics = rows[start - 1] if start else first
    for s, row in enumerate(rows[start:]):
        if (s + 1) % every == 0:
            decay = decay_of(s, STEPS - start) ** every
            statistics = decay * statistics + (1 - decay) * row
    ours = [found[f"{layer}.running_{kind}"] for layer in ("bn1", "bn2") for kind in ("mean", "var")]
    assert (torch.cat(ours).double() - statistics).abs().max() < 1e-6


@pytest.mark.parametrize("stage", ["", "-zero3"])
def test_training_is_the_same_bit_for_bit_with_all_of_it_on(runs: Path, stage: str) -> None:
    """Weights, momentum, statistics, losses. Fails when held weights or statistics are not put back, or dropout's draw
    or the order of data depends on an evaluation."""
    for file in ("model", "optim"):
        on, off = tensors(runs / f"on{stage}", file), tensors(runs / f"off{stage}", file)
        assert on.keys() == off.keys()
        assert all(torch.equal(on[key], off[key]) for key in on)
    for name in ("train/loss", "val/top1", "val/loss"):
        assert metrics(runs / f"on{stage}", name) == metrics(runs / f"off{stage}", name)


def test_worlds_and_stages_average_and_re_estimate_alike(runs: Path) -> None:
    """1, 2 and 4 ranks, ZeRO 3: the average, and the re-estimated statistics of both.

    120 samples are 7 micro-batches of 16 (112), which 2 and 4 ranks do not divide. Fails when a surplus forward counts,
    or ranks draw samples of their own.
    """
    for other in ("on-1", "on-4", "on-zero3"):
        for file in ("ema", "bn_model", "bn_ema"):
            ours, theirs = tensors(runs / "on", file), tensors(runs / other, file)
            assert ours.keys() == theirs.keys()
            assert max(float((ours[k].float() - theirs[k].float()).abs().max()) for k in ours) < TOLERANCE, (
                other,
                file,
            )
        for prefix in (*SCORED.values(), "val_avg", "val_avg_bn"):
            ours, theirs = (metrics(runs / run, f"{prefix}/loss") for run in ("on", other))
            assert len(ours) == len(theirs) == (1 if "avg" in prefix else 5)
            assert ours == pytest.approx(theirs, abs=10 * TOLERANCE)
    assert not torch.equal(tensors(runs / "on", "bn_ema")["bn1.running_mean"], tensors(runs / "on")["bn1.running_mean"])


def test_a_checkpoint_scores_what_the_run_said(runs: Path) -> None:
    """`eval --of` each, on another world. Fails when a file holds other weights or statistics than were scored."""
    for name, prefix in {**SCORED, "average_bn": "val_avg_bn"}.items():
        result = json.loads((runs / f"eval-{name}.json").read_text())
        assert result["correct1"] == round(metrics(runs / "on", f"{prefix}/top1")[-1] * 101)
        assert result["loss"] == pytest.approx(metrics(runs / "on", f"{prefix}/loss")[-1], abs=TOLERANCE)


def test_a_run_handed_from_world_to_world_averages_on(runs: Path) -> None:
    """Stopped at step 7 on 2 ranks, ended by 1 at ZeRO 3. Fails when EMA, its count or snapshots start anew."""
    for file in ("model", "ema"):
        ours, theirs = tensors(runs / "halves", file), tensors(runs / "on", file)
        assert max(float((ours[k].float() - theirs[k].float()).abs().max()) for k in ours) < TOLERANCE
    ours, theirs = (json.loads((runs / run / "summary.json").read_text())["final"] for run in ("halves", "on"))
    assert ours["average_bn"]["top1"] == pytest.approx(theirs["average_bn"]["top1"], abs=1.5 / 101)


def test_the_average_is_the_mean_of_the_best_by_the_metric(runs: Path) -> None:
    """By val_ema/top1, since EMA is on: float64 mean of the files, batch-norm re-estimated, the counter an integer."""
    top1 = metrics(runs / "on", "val_ema/top1")
    ranked = sorted(range(5), key=lambda n: (-top1[n], n))[:K]
    files = sorted((runs / "on" / "snapshots").glob("step_*.safetensors"))
    assert [file.stem for file in files] == sorted(f"step_{4 * (n + 1):08d}" for n in ranked)
    states = [load_file(file) for file in files]
    average = load_file(next((runs / "on" / "average").glob("step_*")) / "model.safetensors")
    for key in states[0]:
        if "running" not in key and states[0][key].is_floating_point():
            assert torch.equal(average[key], (sum(s[key].double() for s in states) / K).float())
    assert average["bn1.num_batches_tracked"].dtype == torch.int64


def test_the_summary_lists_all_and_names_the_best(runs: Path) -> None:
    summary = json.loads((runs / "on" / "summary.json").read_text())
    assert list(summary["final"]) == [*SCORED, "average", "average_bn"]
    prefixes = {**SCORED, "average": "val_avg", "average_bn": "val_avg_bn"}
    for name, prefix in prefixes.items():
        assert summary["final"][name]["top1"] == metrics(runs / "on", f"{prefix}/top1")[-1]
    best = max(max(metrics(runs / "on", f"{prefix}/top1")) for prefix in prefixes.values())
    assert summary["best"]["top1"] == best
    assert best in metrics(runs / "on", f"{prefixes[summary['best']['weights']]}/top1")
    ema_decay = metrics(runs / "on", "ema/decay")
    assert len(ema_decay) == STEPS and set(ema_decay) == {0.9}


def test_a_greedy_average_is_no_worse_than_its_best_member(runs: Path) -> None:
    """Members are ranked by val/loss here. Fails when the soup is scored with other weights than it is made of."""
    snapshots = json.loads((runs / "greedy" / "snapshots" / "index.json").read_text())["snapshots"]
    losses = metrics(runs / "greedy", "val/loss")
    standing = {each["step"]: each["value"] for each in snapshots if each["displaced"] is None}
    assert standing == {4 * (n + 1): losses[n] for n in sorted(range(5), key=lambda n: losses[n])[:K]}
    first = min(standing, key=lambda step: standing[step])
    assert metrics(runs / "greedy", "val_avg/top1")[-1] >= metrics(runs / "greedy", "val/top1")[first // 4 - 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "nth", "every"), [("ema", 3, 3), ("re_estimate", 6, 3), ("average", 1, 3), ("re_estimate", 11, 4)]
)
def test_killed_while_scoring_and_resumed_is_the_run_that_was_not(
    runs: Path, tmp_path: Path, what: str, nth: int, every: int
) -> None:
    """SIGKILL to a rank inside an evaluation of EMA, PreciseBN, the final average, between its two scores.

    Fails when snapshots, best weights, statistics or lines of a scoring that was cut off stay behind.
    """
    config = json.loads((runs / "jobs-2.json").read_text())[0]["argv"]
    argv = [*config, f"--checkpoint.every={every}step"]
    run_killed_jobs(2, [{"name": "killed", "argv": argv, "kill_in": [what, nth]}], tmp_path)
    run_jobs(2, [{"name": "killed", "argv": argv}], tmp_path)
    for file in ("model", "optim", "ema", "bn_model", "bn_ema"):
        ours, theirs = tensors(tmp_path / "killed", file), tensors(runs / "on", file)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("train/loss", "val/top1", "val_ema_bn/loss", "val_avg/loss", "val_avg_bn/loss"):
        assert metrics(tmp_path / "killed", name) == metrics(runs / "on", name)
    assert {f.name: f.read_bytes() for f in (tmp_path / "killed" / "snapshots").glob("*.safetensors")} == {
        f.name: f.read_bytes() for f in (runs / "on" / "snapshots").glob("*.safetensors")
    }


@pytest.mark.slow  # three starts
@pytest.mark.parametrize(("given", "of"), [("average", "average_bn"), ("best", None), ("", None)])
def test_eval_takes_a_part_of_a_run(runs: Path, given: str, of: str | None) -> None:
    """RUN/average, RUN/best, and RUN as --weights beside its config: the very scores of the run."""
    summary = json.loads((runs / "on" / "summary.json").read_text())
    argv = [str(runs / "on" / given)] if given else [str(runs / "on" / "config.yaml"), "--weights", str(runs / "on")]
    session = Session([sys.executable, "-m", "dist_trainer", "eval", *argv], runs / f"eval-{given}.log")
    assert session.wait(120) == 0, session.log.read_text()
    expected = (summary["final"][of] if of else summary["best"])["top1"]
    assert f"top-1 {expected:.2%}" in session.log.read_text()
