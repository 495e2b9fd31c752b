"""Digests of the final weights of four short runs, on 1 and on 2 ranks: run it before and after a change that is to
compute nothing new, on the same machine, and compare the lines.

    python tests/digests.py [--root CHECKOUT]

ZeRO 0 in bf16 with EMA, PreciseBN and averaging; ZeRO 3 in fp32; torch's DDP; fine-tuning from a file. It uses the
command line alone, so that it can be held against any checkout that trains.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
COMMON = [
    "--data.channels=1", "--data.mean=[0.286]", "--data.std=[0.353]", "--data.workers=0", "--augment.flip=0.5",
    "--model.name=small_resnet", "--model.args={stem_width: 8, widths: [16, 24], depths: [1, 1]}",
    "--batch.global_batch=128", "--batch.micro_batch=32", "--duration=24step",
    "--optimizer.args={momentum: 0.9, nesterov: true}", "--optimizer.weight_decay=5.0e-4",
    "--lr.peak=0.1", "--lr.warmup.duration=4step", "--eval.every=6step", "--eval.batch=500",
    "--eval.train_samples=1000", "--log.every=6step", "--checkpoint.every=8step", "--wandb.mode=disabled",
]  # fmt: skip
RUNS = {
    "zero0_bf16": ["--engine.zero=0", "--engine.precision=bf16", "--ema.decay=0.9", "--precise_bn.num_samples=256",
                   "--averaging.top_k=2"],
    "zero3_fp32": ["--engine.zero=3", "--engine.precision=fp32", "--optimizer.name=adamw", "--optimizer.args={}"],
    "torch_fp32": ["--engine.backend=torch", "--engine.precision=fp32", "--mixing.mixup=0.2",
                   "--loss.label_smoothing=0.1"],
    "fine_tuned": ["--engine.precision=fp32", "--model.freeze=[stem]", "--model.pretrained={weights}"],
}  # fmt: skip


def digest(run: Path) -> str:
    """Over names, shapes and bytes of every tensor that the run left."""
    total = hashlib.sha256()
    for path in sorted(run.rglob("*.safetensors")):
        total.update(str(path.relative_to(run)).encode())
        for name, value in sorted(load_file(path).items()):
            total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            total.update(value.contiguous().reshape(-1).view(dtype=torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT)
    root = parser.parse_args().root.resolve()
    data = [f"--data.train={ROOT / 'data/fashion_mnist/val'}", f"--data.val={ROOT / 'data/fashion_mnist/val'}"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "torch_fp32-1" / "checkpoints" / "step_00000024" / "model.safetensors"
        for world in (1, 2):
            for name, argv in RUNS.items():
                run = Path(folder) / f"{name}-{world}"
                command = [
                    sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
                    "-m", "dist_trainer", "train", *COMMON, *data, f"--run.dir={folder}", f"--run.name={run.name}",
                    *(each.format(weights=weights) if "{weights}" in each else each for each in argv),
                ]  # fmt: skip
                done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stdout + done.stderr)
                print(f"{name:<12} {world} rank{'s' if world > 1 else ' '} {digest(run)}", flush=True)


if __name__ == "__main__":
    main()
