"""Kill a run again and again, anywhere, and compare what it ends with: `python tests/support/chaos.py 50 [SEED]`.

SIGKILL of a random rank, twice per launch, after which torchrun starts all ranks again; then of torchrun, alone or with
all of its ranks; then a launch with another number of ranks, now and then on "another machine": without the local
folder, from run.mirror. Each run that comes to its end has to have the bits of the one that nobody disturbed.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cluster_jobs import ARGV, work_folder
from running import Session, tensors, torchrun

from dist_trainer.log.metrics_file import read_rows
from dist_trainer.log.names import EVENTS, SPEED
from dist_trainer.run_folder import checkpoint

STEPS = 24
SHORT = [
    *ARGV, f"--duration={STEPS}step", "--batch.micro_batch=4", "--checkpoint.every=2step", "--eval.every=4step",
    "--model={name: tiny:Marked, args: {}}", "--engine.backend=torch", "--log.every=1step",
]  # fmt: skip
PHASES = ("start", "restart", "step", "save", "upload", "evaluation", "precise_bn", "average")
LONGEST_WAIT_S = 10.0
"""For a phase to come; then the kill comes wherever the run is."""


class Chaos:
    """Runs one after another in `folder`, until `kills` processes were killed. Raises AssertionError."""

    def __init__(self, folder: Path, kills: int, seed: int, say: Callable[[str], None] = print) -> None:
        self.here = work_folder(folder)
        self.dice, self.left, self.say = random.Random(seed), kills, say
        self.killed, self.moves, self.ends = Counter[str](), 0, 0
        self.marks = folder / "marks"
        self.marks.mkdir()

    def launch(self, name: str, world: int, restarts: int = 0) -> Session:
        argv = ["-m", "dist_trainer", "train", "small.yaml", *SHORT, f"--run.name={name}", "--run.mirror=mirror"]
        log = self.here / f"{name}.log"
        return Session(torchrun(world, *argv, restarts=restarts), log, folder=self.here, MARKS=str(self.marks))

    def go(self) -> None:
        """Until no kills are left and the last run is at its end."""
        began = time.monotonic()
        undisturbed = self.launch("undisturbed", 2)
        assert undisturbed.wait() == 0, undisturbed.log.read_text()
        while self.left:
            name = f"run-{self.ends}"
            while not self.over(name):
                continue
            self.compare(name)
            self.ends += 1
        self.say(
            f"{sum(self.killed.values())} kills, {self.moves} moves, {self.ends} runs with the undisturbed one's bits, "
            f"{time.monotonic() - began:.0f} s: {', '.join(f'{n} {what}' for what, n in sorted(self.killed.items()))}"
        )

    def over(self, name: str) -> bool:
        """One launch: two ranks are killed, then torchrun. Whether the run came to its end instead."""
        if self.left and self.dice.random() < 0.3 and (self.here / "mirror" / name).exists():
            shutil.rmtree(self.here / "runs" / name, ignore_errors=True)  # another machine; gone already, maybe
            self.moves += 1
        world = self.dice.choice([1, 2, 3, 4])
        session = self.launch(name, world, restarts=2)
        try:
            for number in range(3):
                if not self.left:
                    break
                phase = self.dice.choice(PHASES)
                self.wait_for(phase, self.here / "runs" / name, session, is_first=number == 0)
                if session.process.poll() is not None:
                    break
                self.left -= 1
                self.kill(session, world, phase, is_last=number == 2)
                if number == 2:
                    return False
            status = session.wait(120)
            if status == 0:
                return True
            assert status in (1, -9), session.log.read_text()[-4000:]  # a restart may be cut off by the end of restarts
            assert "SIGKILL" in session.log.read_text() or "exitcode: -9" in session.log.read_text()
            return False
        finally:
            session.kill()

    def wait_for(self, phase: str, run: Path, session: Session, *, is_first: bool) -> None:
        """Until the run is there, or LONGEST_WAIT_S have passed, or it has ended; then a moment of chance."""
        for mark in self.marks.iterdir():
            mark.unlink()
        if phase in ("start", "restart"):
            time.sleep(self.dice.uniform(0, 3.5 if phase == "start" else 1.5))
            return
        until = time.monotonic() + LONGEST_WAIT_S
        while time.monotonic() < until and session.process.poll() is None and not self.is_in(phase, run):
            time.sleep(0.001)  # between two looks; the deadline decides
        time.sleep(self.dice.uniform(0, 0.01))

    def is_in(self, phase: str, run: Path) -> bool:
        if phase in ("save", "upload"):
            root = run if phase == "save" else self.here / "mirror" / run.name
            folders = (root / "checkpoints").glob("step_*")
            return any(not (each / checkpoint.MANIFEST).exists() for each in folders)
        wanted = "evaluation" if phase == "average" else phase
        marked = any(self.read(mark) == wanted for mark in self.marks.iterdir())
        return marked and (phase != "average" or f'"step": {STEPS},' in self.read(run / "metrics.jsonl"))

    @staticmethod
    def read(file: Path) -> str:
        try:
            return file.read_text()
        except OSError:
            return ""

    def kill(self, session: Session, world: int, phase: str, *, is_last: bool) -> None:
        """A rank; at the last, torchrun, whose ranks are killed too, or hear of it and stop."""
        if not is_last:
            ranks = session.rank_pids()
            if ranks:
                self.end(self.dice.choice(ranks))
            self.killed[phase] += 1
            self.say(f"{self.left:3} left: a rank of {world}, {phase}")
            return
        alone = self.dice.random() < 0.5
        self.end(session.process.pid)
        if not alone:
            session.kill()
        self.killed[f"{phase} (agent)"] += 1
        self.say(f"{self.left:3} left: torchrun of {world}{'' if alone else ' and its ranks'}, {phase}")
        assert not session.left_after(40), session.log.read_text()[-4000:]

    @staticmethod
    def end(pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    # What has to be equal

    def compare(self, name: str) -> None:
        run, other = self.here / "runs" / name, self.here / "runs" / "undisturbed"
        said = f"{name}: {self.here / name}.log"
        for kind in ("model", "ema", "optim", "bn_model", "bn_ema"):
            ours, theirs = tensors(run, kind), tensors(other, kind)
            assert ours.keys() == theirs.keys(), said
            for key in ours:
                assert torch.equal(ours[key], theirs[key]), f"{said}: {kind}: {key}"
        for kind in ("best", "average"):
            (ours, *_), (theirs, *_) = (checkpoint.complete(each / kind) for each in (run, other))
            a, b = (checkpoint.load_tensors(each, "model") for each in (ours, theirs))
            assert ours.name == theirs.name and all(torch.equal(a[key], b[key]) for key in a), f"{said}: {kind}"
        ours_of, theirs_of = self.scores(run), self.scores(other)
        differing = (
            [each for each in ours_of if each not in theirs_of],
            [each for each in theirs_of if each not in ours_of],
        )
        assert ours_of == theirs_of, f"{said}: {len(ours_of)} lines and {len(theirs_of)}: {differing}"
        summaries = [json.loads((each / "summary.json").read_text()) for each in (run, other)]
        for key in ("final", "best", "steps", "skipped", "weights_sha256"):
            assert summaries[0][key] == summaries[1][key], f"{said}: {key}"

    @staticmethod
    def scores(run: Path) -> list[dict[str, Any]]:
        """Every line of the record, without what differs from start to start."""
        varying = {*SPEED, *EVENTS}
        lines = [{key: row[key] for key in row if key not in varying} for row in read_rows(run / "metrics.jsonl")]
        return [line for line in lines if line.keys() - {"step", "epoch"}]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        Chaos(Path(place), int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0).go()
