"""Killed again and again, and started on other numbers of ranks: with exact sums, the weights do not tell."""

import json
import random
import shutil
from pathlib import Path

import pytest
from running import ROOT, Session, metrics, torchrun, wait_for_step

CONFIG = [
    "small.yaml", "--engine.sums=exact", "--batch.micro_batch=4", "--duration=800step", "--eval.every=null",
    "--checkpoint.every=10step", "--log.every=1step",
]  # fmt: skip


@pytest.mark.slow  # six starts
def test_4_then_3_then_1_then_2_then_4_ranks_across_kills_are_the_undisturbed_run(tmp_path: Path) -> None:
    """SIGKILL to torchrun and every rank at a random step, and the next start has another number of them: weights and
    EMA are those of one rank that was not disturbed, bit for bit; each change of world is an event in the log.

    Mutations: resume without momentum; sums in the order of ranks; an event only after an orderly stop.
    """
    source = ROOT / "tests" / "fixtures" / "81fd9c4"
    here = shutil.copytree(source, tmp_path / "here", ignore=shutil.ignore_patterns("runs"))
    run, worlds = here / "runs" / "run", [4, 3, 1, 2, 4]
    for number, world in enumerate(worlds):
        argv = ["-m", "dist_trainer", "train", *CONFIG, "--run.name=run"]
        session = Session(torchrun(world, *argv), here / f"log-{number}", folder=here)
        if number == len(worlds) - 1:
            assert session.wait() == 0, session.log.read_text()[-5000:]
            break
        step = 40 * number + random.randint(15, 35)
        print(f"{world} ranks are killed at step {step}")
        wait_for_step(session, run, step)
        session.kill()
        assert not session.left_after(15), session.left_after(0)
    alone = Session(torchrun(1, "-m", "dist_trainer", "train", *CONFIG, "--run.name=alone"), here / "log", folder=here)
    assert alone.wait() == 0, alone.log.read_text()[-5000:]
    ours, theirs = (json.loads((here / "runs" / name / "summary.json").read_text()) for name in ("run", "alone"))
    assert ours["weights_sha256"] == theirs["weights_sha256"]
    assert metrics(run, "run/world") == worlds[1:]
    events = metrics(run, "run/event")
    for event, world, before in zip(events, worlds[1:], worlds, strict=False):
        ranks = f"{world} rank" + ("s" if world > 1 else "")
        assert event.startswith("started again after it was killed: goes on at step ")
        assert event.endswith(f"on {ranks} instead of {before}")
