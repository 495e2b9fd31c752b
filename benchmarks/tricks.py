"""Every trick switched on in turn on Fashion-MNIST: what a short run with it comes to.

    python benchmarks/tricks.py [--quick] [--json FILE] [--epochs 2] [--only NAME ...]

Trains configs/fashion_mnist.yaml (`make data`) with the keys of one trick on two ranks, one after another; prints
trick, changed keys, final loss as trained, top-1 and seconds of training. Runs stay in runs/tricks and are taken up.
Two epochs say that a trick acts, not what it is worth.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from few import few_fashion
from machine import DATA, SMOKE, Figures, figure, machine, parser, save

from dist_trainer.log.console import Terminal

ROOT = DATA.parent
RUNS = ROOT / "runs/tricks"
TRICKS: dict[str, list[str]] = {
    "base": [],
    "SGD without Nesterov": ["--optimizer.args={momentum: 0.9}"],
    "SGD, decoupled decay": ["--optimizer.name=sgdw", "--optimizer.weight_decay=5e-4"],
    "RMSProp": [
        "--optimizer={name: rmsprop, args: {alpha: 0.9, momentum: 0.9}, weight_decay: 1e-5}",
        "--lr.base=0.001",
    ],
    "RMSProp, TF": ["--optimizer={name: rmsprop_tf, args: {momentum: 0.9}, weight_decay: 1e-5}", "--lr.base=0.001"],
    "Adam": ["--optimizer={name: adam, args: {}}", "--lr.base=0.002"],
    "AdamW": ["--optimizer={name: adamw, args: {}, weight_decay: 0.05}", "--lr.base=0.002"],
    "AdaDelta": ["--optimizer={name: adadelta, args: {}}", "--lr.base=1.0"],
    "LAMB": ["--optimizer={name: lamb, args: {}, weight_decay: 0.01}", "--lr.base=0.01"],
    "LARS": ["--optimizer={name: lars, args: {momentum: 0.9}, weight_decay: 5e-4}", "--lr.base=5.0"],
    "piecewise": ["--lr.schedule={name: piecewise, args: {milestones: [60%, 85%], gamma: 0.1}}"],
    "polynomial": ["--lr.schedule={name: polynomial, args: {power: 1.0}}"],
    "exponential": ["--lr.schedule={name: exponential, args: {gamma: 0.1, every: 50%}}"],
    "constant rate": ["--lr.schedule={name: constant}"],
    "warm-up from base": ["--lr.warmup.start=base", "--lr.base=0.1", "--batch.global_batch=1024"],
    "square-root scaling": ["--lr.scale=sqrt", "--batch.global_batch=1024"],
    "no weight decay": ["--optimizer.weight_decay=0"],
    "decay on norm and bias": ["--optimizer.no_decay=[]"],
    "layer decay": ["--optimizer.layer_decay=0.75"],
    "clipping": ["--engine.clip_grad_norm=1.0"],
    "no label smoothing": ["--loss.label_smoothing=0"],
    "BCE": ["--loss={name: bce, args: {sum_classes: true}}"],
    "growing images": ["--augment.crop={size: 28, scale: [0.5, 1.0], start_size: 20, multiple_of: 4, grow: [0%, 50%]}"],
    "crops": ["--augment.crop={size: 28, scale: [0.5, 1.0]}"],
    "colour jitter": ["--augment.color_jitter=0.4"],
    "AutoAugment": ["--augment.policy.name=autoaugment"],
    "RandAugment": ["--augment.policy.name=randaugment"],
    "TrivialAugment": ["--augment.policy.name=trivialaugment"],
    "RandomErasing": ["--augment.erase.name=random_erasing"],
    "Cutout": ["--augment.erase.name=cutout"],
    "GridMask": ["--augment.erase={name: grid_mask, args: {ramp: 80%}}"],
    "Hide-and-Seek": ["--augment.erase.name=hide_and_seek"],
    "Mixup": ["--mixing.mixup=0.2"],
    "CutMix": ["--mixing.cutmix=1.0"],
    "Mixup and CutMix, not at the end": ["--mixing={mixup: 0.2, cutmix: 1.0, off_last: 25%}"],
    "repeated augmentation": ["--augment.repeats=2"],
    "EMA": ["--ema={decay: 0.99}"],
    "PreciseBN": ["--precise_bn.num_samples=8192"],
    "averaging": ["--averaging.top_k=3", "--eval.every=25%"],
    "gradient checkpointing": ["--engine.gradient_checkpointing=true"],
}


def train(name: str, keys: list[str], epochs: int) -> dict[str, Any]:
    """The summary of one run, with its last loss; one that is there is not repeated."""
    folder = RUNS / f"{name.lower().replace(' ', '_').replace(',', '')}-{epochs}ep"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "dist_trainer", "train", "configs/fashion_mnist.yaml", *keys, f"--run.dir={RUNS}",
        f"--run.name={folder.name}", f"--duration={epochs}ep", "--lr.warmup.duration=10%", "--checkpoint.every=null",
        "--wandb.mode=disabled", "--log.every=10%",
    ]  # fmt: skip
    with (RUNS / f"{folder.name}.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return {**summary, "loss": losses[-1]}


def smoke(names: list[str]) -> None:
    """Ten steps with each trick, all in this process."""
    from dist_trainer.commands.ranks import ranks
    from dist_trainer.commands.train import train_run
    from dist_trainer.config.arguments import new_parser, parse_config

    with ranks() as (world, terminal), tempfile.TemporaryDirectory() as folder:
        for name in names:
            words = [
                "configs/fashion_mnist.yaml", *TRICKS[name], f"--run.dir={folder}", f"--data.train={few_fashion()}",
                f"--data.val={few_fashion()}", "--duration=10step", "--lr.warmup.duration=10%", "--data.workers=0",
                "--eval.every=null", "--eval.train_samples=0", "--batch.global_batch=64", "--batch.micro_batch=16",
                "--wandb.mode=disabled",
            ]  # fmt: skip
            config, _ = parse_config(new_parser("train", ""), words)
            train_run(config, name.lower(), world, Terminal(active=False))
            terminal.say(f"ran: {name}")


def main() -> None:
    arguments = parser(__doc__, "base, Mixup and GridMask for an epoch")
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--only", nargs="+", choices=list(TRICKS), default=list(TRICKS))
    values: Any = arguments.parse_args()
    if SMOKE:
        smoke(list(TRICKS))
        return
    epochs, names = (1, ["base", "Mixup", "GridMask"]) if values.quick else (values.epochs, values.only)
    RUNS.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}, 2 ranks, {epochs} epoch{'s' if epochs > 1 else ''}\n")
    print("| trick | keys | loss | top-1 | s |\n|---|---|---|---|---|")
    figures: Figures = {}
    for name in names:
        done = train(name, TRICKS[name], epochs)
        final, seconds = done["final"], done["seconds"]["train"]
        shown = {"model": "", **{each: f"{each} " for each in final if each != "model"}}
        top1 = ", ".join(f"{shown[each]}{100 * final[each]['top1']:.2f}" for each in final)
        keys = " ".join(f"`{key.removeprefix('--')}`" for key in TRICKS[name])
        print(f"| {name} | {keys} | {done['loss']:.3f} | {top1} | {seconds:.0f} |", flush=True)
        figures[name] = figure(final["model"]["top1"], None, "top-1")
    save(values.json, figures)


if __name__ == "__main__":
    main()
