"""One config on 1, 2, 3 and 4 ranks, at ZeRO 0, 1 and 2: with engine.sums: exact the weights have one digest.

    python benchmarks/same_bits.py [--quick] [--json FILE]

Trains configs/fashion_mnist.yaml for some steps and prints a line per run, then "the same bits", or fails. On GPUs it
starts as many ranks as there are. The peer's column is the time of the same run with engine.sums: fast.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import SMOKE, Figures, figure, machine, parser, save

ROOT = Path(__file__).resolve().parent.parent
ZERO = {1: 0, 2: 1, 3: 2, 4: 0}
ARGV = [
    "--batch.micro_batch=64", "--ema.decay=0.9", "--precise_bn.num_samples=512", "--eval.train_samples=0",
    "--eval.every=null", "--checkpoint.every=null", "--wandb.mode=disabled", "--data.workers=0",
]  # fmt: skip


def trained(world: int, sums: str, steps: int, folder: Path) -> tuple[dict[str, Any], float]:
    """(summary, seconds of training) of one run."""
    name = f"{sums}-{world}"
    argv = ["--standalone", f"--nproc-per-node={world}", "-m", "dist_trainer", "train", "configs/fashion_mnist.yaml"]
    argv += [*ARGV, f"--duration={steps}step", f"--engine.sums={sums}", f"--engine.zero={ZERO[world]}"]
    argv += ["--lr.warmup.duration=25%", f"--run.dir={folder}", f"--run.name={name}"]
    command = [sys.executable, "-m", "dist_trainer", "agent", *argv]
    environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    summary = json.loads((folder / name / "summary.json").read_text())
    return summary, summary["seconds"]["train"]


def main() -> None:
    options = parser(__doc__, "fewer steps, exact sums alone")
    arguments = options.parse_args()
    steps = 4 if SMOKE else 12 if arguments.quick else 40
    worlds = [world for world in ZERO if not torch.cuda.is_available() or world <= torch.cuda.device_count()]
    figures: Figures = {}
    found: dict[int, dict[str, str]] = {}
    print(machine())
    print(f"{'ranks':<7}{'ZeRO':<6}{'top-1':>8}{'training':>10}{'fast':>8}   sha256 of the model, of its average")
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            summary, seconds = trained(world, "exact", steps, Path(folder))
            fast = None if arguments.quick else trained(world, "fast", steps, Path(folder))[1]
            found[world] = digests = summary["weights_sha256"]
            figures[f"{world} ranks"] = figure(seconds / steps, fast / steps if fast else None)
            times = f"{'':>10}{'':>8}" if SMOKE else f"{seconds:>8.1f} s{f'{fast:.1f} s' if fast else '':>8}"
            top1 = summary["final"]["model"]["top1"]
            print(f"{world:<7}{ZERO[world]:<6}{top1:>8.2%}{times}   {digests['model'][:24]}  {digests['ema'][:24]}")
    if any(digests != found[1] for digests in found.values()):
        sys.exit("NOT the same bits")
    print(f"the same bits on {', '.join(map(str, worlds))} ranks, after {steps} steps")
    save(arguments.json, figures)


if __name__ == "__main__":
    main()
