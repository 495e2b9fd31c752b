"""A rank that hangs, gradients that are not finite, memory that is not there: what the run does, and what it says."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from running import TINY, Session, metrics, tensors, torchrun
from safetensors.torch import load_file

TRAIN = ["-m", "dist_trainer", "train", *TINY]


def test_a_rank_that_hangs_ends_all_and_every_rank_says_where_it_stood(fashion: list[str], tmp_path: Path) -> None:
    """Fails without the watchdog, when only the ranks that wait are heard, or when a long evaluation counts as hung."""
    argv = [*TRAIN, *fashion, "--data.stages=[tiny:hangs_on_rank_1]", "--run.timeout=6", "--eval.train_samples=0",
            "--data.retry={timeout: 1, deadline: 2}", f"--run.dir={tmp_path}", "--run.name=run"]  # fmt: skip
    session = Session(torchrun(2, *argv), tmp_path / "log")
    assert session.wait(90) == 1
    log = session.log.read_text()
    for rank, inside in ((0, "train_step"), (1, "hangs_on_rank_1")):
        text = (tmp_path / "run" / "stacks" / f"rank-{rank}.txt").read_text()
        assert text.startswith(f"[rank {rank}] step 1: no progress for 6 s (run.timeout); ended\n")
        assert inside in text
    assert "; the stacks of its threads: " in log
    assert not session.left_after(15)


@pytest.mark.parametrize("zero", [0, 3])
def test_rolling_back_goes_on_past_the_samples_since_the_checkpoint(
    zero: int, fashion: list[str], tmp_path: Path
) -> None:
    """By hand: NaN at step 7 with a checkpoint at 4 passes 5 to 7; the next network's NaN, at 14, passes 13 and 14.
    The network refuses to be made while the one before is in memory: two would not fit on a device that one fills.

    Fails when weights of after the checkpoint stay, when the samples come again, or ranks do not all go back.
    Mutations: keep `run` in train_run; leave to stage 3 what it remembers of the last engine.
    """
    argv = [*TRAIN, *fashion, "--checkpoint.every=4step", "--checkpoint.keep_last=9", f"--run.dir={tmp_path}",
            "--model.name=tiny:OneAtATime", f"--engine.zero={zero}"]  # fmt: skip
    poison = ["--model.args={poison: [12, 0]}", "--engine.not_finite=roll_back", "--run.name=run", "--ema.decay=0.9"]
    session = Session(torchrun(2, *argv, *poison), tmp_path / "log")
    assert session.wait() == 0, session.log.read_text()[-5000:]
    run = tmp_path / "run"
    steps = [*range(1, 5), *range(8, 13), *range(15, 21)]
    assert sorted(set(metrics(run, "step"))) == steps
    assert metrics(run, "train/skipped") == [0] * 4 + [3] * 5 + [5] * 6
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["state"], summary["steps"], summary["skipped"]) == ("done", 20, 5)
    assert session.log.read_text().count("the gradient was not finite: rolled back; continuing after this step") == 2
    # One update after the roll-back the momentum is mu * that of the checkpoint + the gradient, and the weights follow.
    folders = {step: next((run / "checkpoints").glob(f"*{step:03d}")) for step in (4, 8)}
    before, after = ({f: load_file(folders[s] / f"{f}.safetensors") for f in ("model", "optim")} for s in (4, 8))
    rate = metrics(run, "train/lr")[4]
    for name, momentum in after["optim"].items():
        weight = name.removeprefix("momentum_buffer/")
        gradient = momentum - 0.9 * before["optim"][name]
        expected = before["model"][weight] - rate * (gradient + 0.9 * momentum)
        assert torch.allclose(after["model"][weight], expected, atol=1e-6)
    assert all(torch.isfinite(value).all() for value in tensors(run, "ema").values())


def test_a_roll_back_at_the_last_step_ends_with_its_evaluation_and_checkpoint(
    fashion: list[str], tmp_path: Path
) -> None:
    """The last step is not made: the run ends with the weights of the checkpoint before, as its last checkpoint.

    Mutation: leave the loop without a step, and so without a save.
    """
    argv = [sys.executable, *TRAIN, *fashion, "--model.args={poison: [12, 0]}", "--engine.not_finite=roll_back",
            "--duration=4step", "--checkpoint.every=2step", "--lr.warmup.duration=1step", f"--run.dir={tmp_path}",
            "--run.name=run"]  # fmt: skip
    session = Session(argv, tmp_path / "log")
    assert session.wait() == 0, session.log.read_text()[-3000:]
    folders = {step: tmp_path / "run" / "checkpoints" / f"step_0000000{step}" for step in (2, 4)}
    before, last = (load_file(folder / "model.safetensors") for folder in folders.values())
    assert all(torch.equal(before[name], last[name]) for name in before)
    state = json.loads((folders[4] / "state.json").read_text())
    assert (state["step"], state["evaluated_step"], state["skipped"]) == (4, 4, 2)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == "done"


def test_a_gradient_that_is_not_finite_stops_where_that_is_asked_for(fashion: list[str], tmp_path: Path) -> None:
    """In one line, saved, nothing applied; and the arguments that the line advises go on in the same folder.

    Mutations: training goes on; advise a key without its permission.
    """
    argv = [sys.executable, *TRAIN, *fashion, "--model.args={poison: [12, 0]}", "--engine.not_finite=stop",
            f"--run.dir={tmp_path}", "--run.name=run"]  # fmt: skip
    session = Session(argv, tmp_path / "log")
    assert session.wait() == 2
    line = "dist-trainer: stopped after step 4, saved; start again to continue: its gradient was not finite and was not"
    assert session.log.read_text().splitlines()[-1].startswith(line)
    assert (tmp_path / "run" / "STATE").read_text() == "mistake\n"
    assert all(torch.isfinite(value).all() for value in tensors(tmp_path / "run").values())
    advised = re.search(r"\((--lr\.peak=\S+ --run\.allow_change=\S+)\)", session.log.read_text())
    assert advised is not None
    again = Session([*argv, *shlex.split(advised[1])], tmp_path / "log")
    again.wait()  # this network is poisonous again, four steps later
    assert "resuming from step_00000004" in again.log.read_text()
    assert metrics(tmp_path / "run", "train/lr")[-1] < 0.05


def test_too_little_memory_names_the_micro_batch_and_smaller_ones(fashion: list[str], tmp_path: Path) -> None:
    """In one line. Fails when the allocator's traceback comes instead."""
    argv = [sys.executable, *TRAIN, *fashion, "--model.name=tiny:Hungry", f"--run.dir={tmp_path}", "--run.name=run"]
    session = Session(argv, tmp_path / "log")
    assert session.wait() == 2
    (line,) = [line for line in session.log.read_text().splitlines() if line.startswith("dist-trainer:")]
    assert "step 2: out of memory with micro-batches of 16 samples" in line
    assert "(8, 4, 2, 1: --batch.micro_batch)" in line
    assert "Traceback" not in session.log.read_text()
