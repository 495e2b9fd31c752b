"""Fashion-MNIST with micro-batches of 8: what EMA, PreciseBN and averaging are worth where statistics are noisy.

    python benchmarks/noisy_batch_norm.py [--quick] [--json FILE] [--plot FILE.png] [--seeds 3] [--epochs 2]

Trains the demo's network (`make data`), scores everything at each evaluation, prints top-1 as mean +- standard error
over the seeds, and the final average beside the best single weights. Runs stay in
runs/noisy_batch_norm and are taken up.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from few import few_fashion
from machine import DATA, SMOKE, Figures, figure, machine, parser, save

ROOT = DATA.parent
RUNS = Path(tempfile.mkdtemp()) if SMOKE else ROOT / "runs/noisy_batch_norm"
SCORED = {"val": "model", "val_bn": "model, BN re-estimated", "val_ema": "EMA", "val_ema_bn": "EMA, BN re-estimated"}
AVERAGED = {"val_avg": "average of the 3 best", "val_avg_bn": "average, BN re-estimated"}


def train(seed: int, epochs: int) -> Path:
    """One run; one that is there is not repeated."""
    name = f"seed{seed}-{epochs}ep"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "dist_trainer", "train", "configs/fashion_mnist.yaml", f"--run.dir={RUNS}", f"--run.name={name}",
        f"--run.seed={seed}", "--batch.global_batch=64", "--batch.micro_batch=8", f"--duration={epochs}ep",
        "--lr.warmup.duration=50%",
        "--eval.every=12.5%", "--checkpoint.every=null", "--wandb.mode=disabled", "--ema.decay=0.998",
        "--ema.ramp=threshold", "--precise_bn.num_samples=8192", "--averaging.top_k=3", "--log.every=200step",
    ]  # fmt: skip
    if SMOKE:
        command += [f"--data.train={few_fashion()}", f"--data.val={few_fashion()}", "--precise_bn.num_samples=64"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return RUNS / name


def top1(run: Path, prefix: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[f"{prefix}/top1"] for line in lines if f"{prefix}/top1" in line]


def mean(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} +- {100 * error:.2f}"


def plot(path: str, curves: dict[str, list[list[float]]], epochs: int) -> None:
    import matplotlib.pyplot as plt

    figure_, axes = plt.subplots(figsize=(7, 4.2))
    for name, runs in curves.items():
        points = [epochs * (n + 1) / len(runs[0]) for n in range(len(runs[0]))]
        middle = [100 * statistics.mean(values) for values in zip(*runs, strict=True)]
        (line,) = axes.plot(points, middle, marker="o", markersize=3, label=name)
        lows = [100 * min(values) for values in zip(*runs, strict=True)]
        highs = [100 * max(values) for values in zip(*runs, strict=True)]
        axes.fill_between(points, lows, highs, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="epoch", ylabel="top-1 (%)", title="Fashion-MNIST, micro-batches of 8")
    axes.grid(alpha=0.3)
    axes.legend()
    figure_.tight_layout()
    figure_.savefig(path, dpi=130)


def main() -> None:
    arguments = parser(__doc__, "one seed, half an epoch")
    arguments.add_argument("--plot", help="write the curves to this PNG (needs matplotlib)")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--epochs", type=int, default=2)
    values: Any = arguments.parse_args()
    seeds, epochs = (1, 1) if values.quick else (values.seeds, values.epochs)
    runs = [train(seed, epochs) for seed in range(seeds)]
    curves = {name: [top1(run, prefix) for run in runs] for prefix, name in SCORED.items()}
    if SMOKE:
        shutil.rmtree(RUNS)
        print(f"ran: {'; '.join([*curves, *AVERAGED.values()])}")
        return
    print(f"\n{machine()}, 2 ranks, {seeds} seeds, top-1 in %")
    points = len(next(iter(curves.values()))[0])
    print(f"{'epoch':<28}" + "".join(f"{epochs * (n + 1) / points:>16.2f}" for n in range(points)))
    for name, series in curves.items():
        print(f"{name:<28}" + "".join(f"{mean([each[n] for each in series]):>16}" for n in range(points)))
    best = [max(max(each[n]) for each in curves.values()) for n in range(seeds)]
    figures: Figures = {}
    print(f"{'best single weights':<28}{mean(best):>16}")
    for prefix, name in AVERAGED.items():
        last = [top1(run, prefix)[-1] for run in runs]
        print(f"{name:<28}{mean(last):>16}")
        figures[name] = figure(statistics.mean(last), statistics.mean(best), "top-1")
    figures |= {
        f"{name}, at the end": figure(statistics.mean(s[-1] for s in each), None, "top-1")
        for name, each in curves.items()
    }
    if values.plot:
        plot(values.plot, curves, epochs)
    save(values.json, figures)


if __name__ == "__main__":
    main()
