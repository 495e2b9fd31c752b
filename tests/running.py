"""Start real ranks: torchrun, its environment, and what is left of it afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
RANKS = Path(__file__).parent / "ranks"
FASHION = ROOT / "data" / "fashion_mnist"

# A network, a batch of four micro-batches and a rate at which 20 steps move every weight.
TINY = [
    "--data.channels=1", "--data.mean=[0.286]", "--data.std=[0.353]", "--data.workers=0",
    "--model.name=tiny:SmoothNet",
    "--batch.global_batch=64", "--batch.micro_batch=16", "--duration=20step",
    "--optimizer.args={momentum: 0.9, nesterov: true}", "--optimizer.weight_decay=5.0e-4",
    "--lr.peak=0.1", "--lr.warmup.duration=4step", "--loss.label_smoothing=0.1",
    "--engine.precision=fp32", "--eval.every=null", "--eval.batch=500", "--log.every=1step",
    "--checkpoint.every=null", "--wandb.mode=disabled",
]  # fmt: skip


class Session:
    """One torchrun and everything that descends from it, told apart by a variable in its environment."""

    def __init__(self, argv: list[str], log: Path, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self.log = log
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "WANDB_"))},
            "OMP_NUM_THREADS": "1",
            "DIST_TRAINER_TEST": self._mark,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{RANKS}",
            **environment,
        }
        with log.open("a") as out:
            self.process = subprocess.Popen(argv, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)

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
        """The exit status; on a time-out the session is ended and its log shown."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end after {timeout} s:\n{self.log.read_text()[-5000:]}") from None

    def kill(self) -> None:
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def left_after(self, seconds: float) -> dict[int, str]:
        """Processes that are still there once `seconds` have passed; returns as soon as there is none."""
        deadline = time.monotonic() + seconds
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)  # between two looks at /proc; nothing is assumed to be done after it
        return left


def torchrun(world: int, *argv: str, restarts: int = 0) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
        f"--max-restarts={restarts}", *argv,
    ]  # fmt: skip


def run_jobs(
    world: int,
    jobs: list[dict[str, Any]],
    folder: Path,
    survives: bool = True,
    seconds: float = 300,
    **environment: str,
) -> None:
    """Run every job of tests/ranks/jobs.py in one start of `world` ranks; run folders appear in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"jobs-{world}.json"
    file.write_text(json.dumps(jobs))
    session = Session(torchrun(world, str(RANKS / "jobs.py"), str(file), str(folder)), folder / "log", **environment)
    status = session.wait(timeout=seconds)
    assert (status == 0) == survives, session.log.read_text()[-6000:]


def metrics(run: Path, name: str) -> list[float]:
    """The values of one metric in a run's metrics.jsonl, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def tensors(run: Path, name: str = "model") -> dict[str, Any]:
    """Tensors of a run's newest checkpoint."""
    return load_file(newest(run) / f"{name}.safetensors")
