"""Start real ranks: torchrun, its environment, and what is left of it afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
RANKS, SUPPORT = ROOT / "tests" / "ranks", ROOT / "tests" / "support"
FASHION = ROOT / "data" / "fashion_mnist"
PATIENCE = 3
"""How much longer than on a quiet machine a test waits for what must come: on a busy one it comes later, and waiting
costs nothing where it comes."""
ENVIRONMENT = dict(os.environ)
"""As it was before any test: ranks that all tests share see no test's variables."""

# A network, a batch of four micro-batches and a rate at which 20 steps move every weight.
TINY = [
    "--data.channels=1", "--data.mean=[0.286]", "--data.std=[0.353]", "--data.workers=0",
    "--model.name=tiny:SmoothNet",
    "--batch.global_batch=64", "--batch.micro_batch=16", "--duration=20step",
    "--optimizer.args={momentum: 0.9, nesterov: true}", "--optimizer.weight_decay=5.0e-4",
    "--lr.peak=0.1", "--lr.warmup.duration=4step", "--loss.label_smoothing=0.1",
    "--engine.precision=fp32", "--eval.every=null", "--eval.batch=500", "--eval.train_samples=200", "--log.every=1step",
    "--checkpoint.every=null", "--wandb.mode=disabled",
]  # fmt: skip


class Session:
    """One torchrun and everything that descends from it, told apart by a variable in its environment."""

    def __init__(
        self,
        argv: list[str],
        log: Path,
        inherited: Mapping[str, str] = os.environ,
        folder: Path = ROOT,
        **environment: str,
    ) -> None:
        """`argv` in the working folder `folder`."""
        self._mark = uuid.uuid4().hex
        self.log = log
        env = {
            **{k: v for k, v in inherited.items() if not k.startswith(("SLURM_", "WANDB_"))},
            "OMP_NUM_THREADS": "1",
            "DIST_TRAINER_TEST": self._mark,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{RANKS}",
            **environment,
        }
        with log.open("a") as out:
            self.process = subprocess.Popen(argv, env=env, cwd=folder, stdout=out, stderr=subprocess.STDOUT)

    def pids(self) -> dict[int, str]:
        """Live processes of this session: pid -> command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if f"DIST_TRAINER_TEST={self._mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                        if state not in "ZX":
                            found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue  # it ended meanwhile
        return found

    def rank_pids(self) -> list[int]:
        """The training processes: neither torchrun nor loader workers nor W&B."""
        return [
            pid
            for pid, line in self.pids().items()
            if "-m dist_trainer train" in line and "torch.distributed.run" not in line
        ]

    def wait(self, timeout: float = 240) -> int:
        """The exit status; after PATIENCE x `timeout` seconds the session is ended and its log shown."""
        try:
            return self.process.wait(PATIENCE * timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end after {PATIENCE * timeout} s:\n{self.log.read_text()[-5000:]}") from None

    def kill(self) -> None:
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def left_after(self, seconds: float) -> dict[int, str]:
        """Processes that are still there after PATIENCE x `seconds`; returns as soon as there is none."""
        deadline = time.monotonic() + PATIENCE * seconds
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)  # between two looks at /proc; nothing is assumed to be done after it
        return left


def torchrun(world: int, *argv: str, restarts: int = 0) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
        f"--max-restarts={restarts}", *argv,
    ]  # fmt: skip


class RankPool:
    """A start of `world` ranks that run one script of tests/ranks after another (see pool.py there)."""

    def __init__(self, world: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=f"ranks-{world}-"))
        self.extensions = self._folder / "extensions"
        """Where DeepSpeed would build its own."""
        command = torchrun(world, str(RANKS / "pool.py"), str(self._folder), str(os.getpid()))
        self.session = Session(command, self._folder / "log", ENVIRONMENT, TORCH_EXTENSIONS_DIR=str(self.extensions))
        self._number = 0

    def run(self, script: str, argv: list[str], seconds: float) -> bool:
        """Whether `script.main(world, argv)` came back on every rank. Raises AssertionError after `seconds`."""
        number, self._number = self._number, self._number + 1
        deadline, file = time.monotonic() + seconds, self._folder / f"{number}.json"
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps({"script": script, "argv": argv}))
        temporary.replace(file)
        while not file.with_suffix(".done").exists():
            if self.session.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self.session.kill()
                raise AssertionError(f"{script}: no end after {seconds} s:\n{self.said()}")
            time.sleep(0.02)  # between two looks; the deadline decides
        return True

    def said(self) -> str:
        return self.session.log.read_text()[-6000:]

    def close(self) -> None:
        (self._folder / "end").touch()
        self.session.wait(60)
        shutil.rmtree(self._folder, ignore_errors=True)


POOLS: dict[int, RankPool] = {}
"""One per number of ranks, for all tests of a session; conftest.py ends them."""


def run_ranks(world: int, script: str, *argv: object, seconds: float = 300) -> RankPool:
    """Run `main(world, argv)` of a script of tests/ranks on `world` ranks, in the start that all tests share."""
    if world not in POOLS:
        POOLS[world] = RankPool(world)
    pool = POOLS[world]
    if not pool.run(script, [str(each) for each in argv], seconds):
        del POOLS[world]
        raise AssertionError(f"{script} failed:\n{pool.said()}")
    return pool


def run_jobs(world: int, jobs: list[dict[str, Any]], folder: Path, seconds: float = 300) -> RankPool:
    """Run every job of tests/ranks/jobs.py on `world` ranks, one after another; run folders appear in `folder`."""
    return run_ranks(world, "jobs", _written(jobs, folder, world), folder, seconds=seconds)


def run_killed_jobs(world: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """The same in a start of their own, whose ranks do not survive them."""
    pool = RankPool(world)
    assert not pool.run("jobs", [_written(jobs, folder, world), str(folder)], 300), pool.said()
    pool.close()


def _written(jobs: list[dict[str, Any]], folder: Path, world: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"jobs-{world}.json"
    file.write_text(json.dumps(jobs))
    return str(file)


def metrics(run: Path, name: str) -> list[Any]:
    """The values of one metric in a run's metrics.jsonl, in order; those of events if it is one of theirs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line and ("run/event" in line) == name.startswith("run/")]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def tensors(run: Path, name: str = "model") -> dict[str, Any]:
    """Tensors of a run's newest checkpoint."""
    return load_file(newest(run) / f"{name}.safetensors")


def wait_for_step(session: Session, run: Path, step: int) -> None:
    """Return when the run has logged `step`, while it still trains."""
    deadline = time.monotonic() + PATIENCE * 60
    while time.monotonic() < deadline:
        assert session.process.poll() is None, session.log.read_text()[-5000:]
        if (run / "metrics.jsonl").exists() and max(metrics(run, "step"), default=0) >= step:
            return
        time.sleep(0.02)  # between two looks at the log; the deadline decides
    raise AssertionError(f"step {step} was not reached")


def assert_same_end(run: Path, undisturbed: Path) -> None:
    assert (run / "STATE").read_text() == "done\n"
    for file in ("model", "optim"):
        ours, theirs = tensors(run, file), tensors(undisturbed, file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for name in ("step", "train/loss", "train/lr", "val/top1"):
        assert metrics(run, name) == metrics(undisturbed, name)
