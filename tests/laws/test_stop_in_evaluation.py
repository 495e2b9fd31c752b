"""A signal while weights are scored: all ranks leave at the same batch, and the evaluation is made again later."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from running import PATIENCE, TINY, Session, assert_same_end, metrics, torchrun

# Each of four evaluations has 250 batches per rank, each of two re-estimations 256.
SCORING = [
    "--duration=10step", "--eval.every=5step", "--eval.batch=1", "--eval.train_samples=0", "--log.every=1step",
    "--precise_bn.num_samples=8192", "--ema.decay=0.9", "--averaging.top_k=2",
]  # fmt: skip


def until(session: Session, text: str) -> None:
    deadline = time.monotonic() + PATIENCE * 120
    while text not in session.log.read_text():
        assert session.process.poll() is None and time.monotonic() < deadline, session.log.read_text()[-5000:]
        time.sleep(0.005)  # between two looks; the deadline decides


@pytest.mark.slow  # five starts; one process alone is below
def test_a_stop_does_not_wait_for_four_evaluations(fashion: list[str], tmp_path: Path) -> None:
    """To one rank of two: within PreciseBN, then within an evaluation, then within that of the average at the end. Each
    start goes on with the evaluation that was cut short, from its begin; in the end, everything is as if undisturbed,
    every score once.

    Mutations: vote on the own rank alone; a cut evaluation counts as made; make a step after it; its scores stay in
    metrics.jsonl.
    """
    argv = ["-m", "dist_trainer", "train", *TINY, *fashion, *SCORING, f"--run.dir={tmp_path}"]
    undisturbed = Session(torchrun(2, *argv, "--run.name=undisturbed"), tmp_path / "log")
    assert undisturbed.wait() == 0, undisturbed.log.read_text()[-5000:]
    run, command = tmp_path / "run", torchrun(2, *argv, "--run.name=run")
    for number, (text, later, step) in enumerate(
        [
            ("step 5: model: top-1", "step 5: EMA: top-1", 5),
            ("goes on at step 5", "step 5: EMA: top-1", 5),
            ("step 10: EMA, BN re-estimated: top-1", "step 10: average, BN re-estimated: top-1", 10),
        ]
    ):
        session = Session(command, tmp_path / f"log-{number}")
        until(session, text)
        os.kill(session.rank_pids()[-1], signal.SIGUSR1)
        assert session.wait(60) == 0, session.log.read_text()[-5000:]
        said = session.log.read_text()
        assert f"stopped by SIGUSR1 after step {step}, saved" in said
        assert later not in said
        assert (run / "STATE").read_text() == "stopped\n"
        assert not session.left_after(15), session.left_after(0)
    session = Session(command, tmp_path / "log-last")
    assert session.wait() == 0, session.log.read_text()[-5000:]
    assert_same_end(run, tmp_path / "undisturbed")
    for name in ("val_bn/top1", "val_ema/top1", "val_ema_bn/top1", "val_avg/top1", "val_avg_bn/top1"):
        assert metrics(run, name) == metrics(tmp_path / "undisturbed", name)
    assert metrics(run, "run/event") == [
        f"started again after a stop: goes on at step {step} on 2 ranks" for step in (5, 5, 10)
    ]


def test_one_process_stops_within_an_evaluation_too(fashion: list[str], tmp_path: Path) -> None:
    """Saved, and the evaluation is made again. Mutations: the vote is for several ranks; its scores stay."""
    argv = ["-m", "dist_trainer", "train", *TINY, *fashion, *SCORING, f"--run.dir={tmp_path}", "--run.name=run"]
    session = Session([sys.executable, *argv], tmp_path / "log")
    until(session, "step 5: model: top-1")
    os.kill(session.process.pid, signal.SIGTERM)
    assert session.wait(60) == 3
    assert "step 5: EMA: top-1" not in session.log.read_text()
    session = Session([sys.executable, *argv, "--precise_bn.num_samples=16", "--eval.batch=500"], tmp_path / "log-2")
    assert session.wait(60) == 0, session.log.read_text()[-5000:]
    assert len(metrics(tmp_path / "run", "val/top1")) == len(metrics(tmp_path / "run", "val_ema/top1")) == 2
