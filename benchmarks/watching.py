"""What showing a run costs it: whole runs of the demo's config on two ranks, watched in every way and in none.

    python benchmarks/watching.py [--quick] [--json FILE] [--rounds N]

The sides: W&B offline; W&B online at a server that accepts and never answers, which goes offline; offline with
TensorBoard and CSV. Each is held against the same run with W&B disabled. They take turns in changing order. All sides
must end with the same weights. Seconds are those of the whole command, from its start to its exit.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import SMOKE, Figures, figure, interleaved, machine, parser, save, table, timed

ROOT = Path(__file__).resolve().parent.parent
SIDES = {
    "not watched": ["--wandb.mode=disabled"],
    "W&B offline": ["--wandb.mode=offline"],
    "W&B, no answer": ["--wandb.mode=online", "--wandb.timeout=5"],
    "offline, TensorBoard, CSV": ["--wandb.mode=offline", "--log.tensorboard=true", "--log.csv=true"],
}


def run(name: str, number: int, duration: str, folder: Path, environment: dict[str, str]) -> str:
    """The digest of the weights."""
    argv = ["--standalone", "--nproc-per-node=2", "-m", "dist_trainer", "train", "configs/fashion_mnist.yaml"]
    argv += [*SIDES[name], f"--duration={duration}", "--lr.warmup.duration=10%", "--log.every=20step"]
    argv += [f"--run.dir={folder}", f"--run.name={name.replace(' ', '_')}-{number}"]
    command = [sys.executable, "-m", "dist_trainer", "agent", *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    summary = json.loads((folder / argv[-1].removeprefix("--run.name=") / "summary.json").read_text())
    digest: str = summary["weights_sha256"]["model"]
    return digest


def main() -> None:
    options = parser(__doc__, "30 steps, one round, W&B offline alone")
    options.add_argument("--rounds", type=int, default=3)
    arguments = options.parse_args()
    duration = "30step" if arguments.quick else "2ep"
    names = [name for name in SIDES if SMOKE or not arguments.quick or name in ("not watched", "W&B offline")]
    digests: set[str] = set()
    print(machine())
    listener = socket.create_server(("127.0.0.1", 0))  # the kernel accepts for it; nobody answers
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | {
        "WANDB_BASE_URL": f"http://127.0.0.1:{listener.getsockname()[1]}", "WANDB_API_KEY": "a" * 40,
        "WANDB_ERROR_REPORTING": "false", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        count = iter(range(10_000))

        def side(name: str) -> None:
            digests.add(run(name, next(count), duration, Path(folder), environment))

        sides = {name: lambda name=name: side(name) for name in names}  # type: ignore[misc]
        rounds = 1 if arguments.quick else arguments.rounds
        if SMOKE:
            seconds = {name: timed(call)[0] for name, call in sides.items()}
        else:
            seconds = interleaved(sides, rounds, time.perf_counter)  # type: ignore[arg-type]
    plain = seconds.pop("not watched")
    figures: Figures = {f"{name}, {duration}": figure(each, plain) for name, each in seconds.items()}
    table("whole runs", figures, "not watched")
    if len(digests) != 1:
        sys.exit("NOT the same weights")
    print(f"the same weights, however it is watched: {digests.pop()[:24]}")
    save(arguments.json, figures)


if __name__ == "__main__":
    main()
