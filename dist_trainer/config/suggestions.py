"""What was meant by a key that does not exist: the nearest that does, or ours for another trainer's."""

import difflib
from collections.abc import Sequence

from dist_trainer.errors import nearest

ELSEWHERE = {
    "aa": "augment.policy.name",
    "accum_steps": "batch.micro_batch: a step's samples are accumulated in micro-batches of this size",
    "amp": "engine.precision",
    "auto_augment": "augment.policy.name",
    "batch_size": "batch.global_batch (of all devices) and batch.micro_batch (per forward)",
    "clip_grad": "engine.clip_grad_norm",
    "color_jitter": "augment.color_jitter",
    "config_file": "a path, the first word after the command",
    "cutmix_alpha": "mixing.cutmix",
    "data_dir": "data.train and data.val",
    "data_path": "data.train and data.val",
    "deepspeed": "engine.backend: deepspeed, which is the default",
    "device": "--devices N, or launch/local.sh",
    "drop": "model.dropout",
    "epoch": "duration: 90ep",
    "epochs": "duration: 90ep",
    "evaluate": "dist-trainer eval",
    "gpus": "--devices N, or launch/local.sh",
    "gradient_accumulation_steps": "batch.micro_batch: a step's samples are accumulated in micro-batches of this size",
    "image_size": "augment.crop.size (training), eval.resize and eval.crop",
    "img_size": "augment.crop.size (training), eval.resize and eval.crop",
    "input_size": "augment.crop.size (training), eval.resize and eval.crop",
    "iterations": "duration: 450000step",
    "learning_rate": "lr.base (per 256 samples) or lr.peak",
    "logger": "wandb.mode, log.tensorboard, log.csv",
    "max_epochs": "duration: 90ep",
    "max_steps": "duration: 450000step",
    "milestones": "lr.schedule: {name: piecewise, args: {milestones: [30ep, 60ep, 80ep]}}",
    "mixup_alpha": "mixing.mixup",
    "model_ema": "ema.decay",
    "model_ema_decay": "ema.decay",
    "momentum": "optimizer.args.momentum",
    "nodes": "slurm/train.sbatch, or torchrun on each node",
    "num_classes": "nothing: the classes are counted in data.train (or model.args.num_classes)",
    "num_epochs": "duration: 90ep",
    "num_gpus": "--devices N, or launch/local.sh",
    "num_workers": "data.workers",
    "opt": "optimizer.name",
    "output": "run.dir",
    "output_dir": "run.dir",
    "reprob": "augment.erase: {name: random_erasing, args: {p: 0.25}}",
    "resume": "nothing: a run that is started again with the same config goes on",
    "save_dir": "run.dir",
    "sched": "lr.schedule.name",
    "scheduler": "lr.schedule.name",
    "smoothing": "loss.label_smoothing",
    "steps": "duration: 450000step",
    "train_dir": "data.train",
    "val_dir": "data.val",
    "wandb_project": "wandb.project",
    "warmup_epochs": "lr.warmup.duration: 5ep",
    "warmup_steps": "lr.warmup.duration: 500step",
    "wd": "optimizer.weight_decay",
}
"""Flags of timm, torchvision's references, Lightning, Composer and transformers -> what does the same here."""


def suggestion(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for a key, by its last word or as a whole; or an empty string."""
    elsewhere = ELSEWHERE.get(name.lower().replace("-", "_").removeprefix("trainer.").removeprefix("model."))
    if elsewhere is not None:
        return f"; here it is {elsewhere}"
    word = last_word(name).replace("-", "_")
    same = [key for key in known if last_word(key) == word]
    if same and "." not in name:
        return f"; did you mean {' or '.join(map(repr, same[:3]))}?"
    if alike := nearest(name, known):
        return alike
    found = difflib.get_close_matches(word, map(last_word, known), n=1, cutoff=0.75)
    return "".join(f"; did you mean {key!r}?" for key in known if last_word(key) in found[:1])


def last_word(key: str) -> str:
    return key.rpartition(".")[2]
