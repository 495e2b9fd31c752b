"""Advice on a config: before a run, warnings of keys that work against each other; after it, the keys to change."""

import os
from collections.abc import Mapping, Sequence

from torch import nn

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.augment.policy import OFF
from dist_trainer.errors import plural, some
from dist_trainer.run.blueprint import Blueprint
from dist_trainer.tricks.diagnosis import Verdict
from dist_trainer.tricks.no_decay import decaying_vectors

SMALL = 12_000_000
VERY_SMALL = 2_000_000
"""Numbers of parameters. ResNet-18 is below the first, MobileNets of a quarter of the width are below the second."""
MANY_CLASSES = 1000
"""With fewer, a network is not small for its task."""


def warnings(
    config: TrainConfig,
    parts: Blueprint,
    num_classes: int,
    without_samples: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """One line each, of what is legal and suspicious. Accuracies are PaddleClas's, on ImageNet ("Tricks for training",
    2.2.4 to 2.2.6). `without_samples`: names of classes that no sample has, by key.
    """
    lines = _of_data(config, without_samples or {})
    ema, updates = config.ema, parts.plan.total_steps - parts.ema_start
    if ema.decay is not None and ema.ramp != "threshold" and (1.0 - ema.decay) * updates < 1.0:
        lines.append(
            f"ema.decay: {ema.decay:g} averages over the last {1 / (1 - ema.decay):,.0f} updates, and there are "
            f"{updates:,}: it stays near its start; take {1 - 10 / max(updates, 20):.6g}, or ema.ramp: threshold"
        )
    rate = parts.learning_rate
    if rate.warmup and rate.start > rate.peak:
        lines.append(
            f"lr.warmup.start: base, {rate.start:g}, is above the peak, {rate.peak:g}: warm-up goes down; leave it "
            "out, or raise batch.global_batch"
        )
    vectors = decaying_vectors(parts.model, config.optimizer.no_decay) if config.optimizer.weight_decay else []
    if vectors:
        lines.append(
            f"optimizer.no_decay: {plural(len(vectors), 'parameter')} of one dimension ({some(vectors)}) decay, which "
            "timm leaves out; add vector to leave them out here"
        )
    if parts.unused:
        lines.append(
            f"model.name: {plural(len(parts.unused), 'parameter')} without a gradient, which the network does not use: "
            f"{some(parts.unused)}"
        )
    lines += _of_loss(config, parts)
    lines += _of_lengths(config, parts)
    crop, size = config.augment.crop, parts.augment.size(parts.augment.last_step)
    if crop is not None and size is not None and size < crop.size:
        lines.append(
            f"augment.crop.grow: until {crop.grow[1]} is too late: the last epoch trains at {size} pixels, not at "
            f"augment.crop.size, {crop.size}"
        )
    if not config.model.pretrained and not config.run.start_from:
        if config.model.freeze:
            lines.append("model.freeze: what is frozen stays at random values; set model.pretrained")
        if config.optimizer.layer_decay < 1:
            lines.append(
                f"optimizer.layer_decay: {config.optimizer.layer_decay:g} holds back layers that have everything to "
                "learn; it is for fine-tuning: set model.pretrained"
            )
    return [*lines, *_of_size(config, num_parameters(parts.model), num_classes)]


def _of_data(config: TrainConfig, without_samples: Mapping[str, Sequence[str]]) -> list[str]:
    lines = []
    if os.path.normpath(config.data.val) == os.path.normpath(config.data.train):
        lines.append("data.val: is data.train: its accuracy is that of samples that were trained on")
    means = {"data.train": "which cannot be learned", "data.val": "so top-1 is over the others"}
    for key, names in without_samples.items():
        if names:
            first = "; do its labels begin at 1?" if list(names) == ["0"] else ""
            lines.append(
                f"{key}: {plural(len(names), 'class')} without a sample, {means[key]}: {some(map(repr, names))}{first}"
            )
    resize, crop = config.eval.resize, config.eval.crop
    if resize is not None and crop is not None and resize < crop:
        lines.append(f"eval.resize: {resize} is below eval.crop, {crop}: images are scored within a black border")
    return lines


def _of_lengths(config: TrainConfig, parts: Blueprint) -> list[str]:
    """Erased lengths that are no pixel at the size of the run's images."""
    size = parts.augment.size(parts.augment.last_step)
    key = {"cutout": "length", "grid_mask": "d_min", "hide_and_seek": "sizes"}.get(config.augment.erase.name)
    given = config.augment.erase.args.get(key) if key is not None else None
    if size is None or given is None:
        return []
    none = [each for each in (given if isinstance(given, list) else [given]) if each and each * size < 224 / 2]
    return [
        f"augment.erase.args.{key}: {each} is of an image of 224; of {size} pixels it is none: nothing is erased"
        for each in none
    ]


def _of_loss(config: TrainConfig, parts: Blueprint) -> list[str]:
    lines = []
    mixed = config.mixing.mixup or config.mixing.cutmix
    if mixed and not getattr(parts.loss, "soft_targets", False):
        lines.append(
            f"loss.name: {config.loss.name} takes labels only, so mixed samples get s L(a) + (1 - s) L(b), which "
            "is that of mixed targets only where L is linear in them; soft_targets = True on it asks for probabilities"
        )
    smoothing = config.loss.label_smoothing
    if config.loss.name == "bce":
        if config.loss.args.get("target_threshold") is not None and smoothing:
            lines.append("loss.args.target_threshold: undoes loss.label_smoothing, since smoothed targets are cut too")
        if config.optimizer.name == "sgd" and not config.loss.args.get("sum_classes"):
            lines.append(
                "loss.name: bce as the mean over classes has gradients far smaller than cross_entropy's, which sgd "
                "does not make up for; set loss.args.sum_classes, or a larger rate"
            )
    return lines


def _of_size(config: TrainConfig, size: int, num_classes: int) -> list[str]:
    """Regularisation that is too strong for a network with `size` parameters."""
    lines, smoothing = [], config.loss.label_smoothing
    if num_classes >= MANY_CLASSES and smoothing and size < SMALL:
        lines.append(
            f"loss.label_smoothing: {smoothing:g} may cost a network of {size / 1e6:.1f} M parameters accuracy "
            "(ResNet18: 70.98 without, 70.81 with 0.1)"
        )
    if num_classes >= MANY_CLASSES and size < VERY_SMALL:
        if config.optimizer.name == "sgd" and config.optimizer.weight_decay >= 1e-4:
            lines.append(
                f"optimizer.weight_decay: {config.optimizer.weight_decay:g} is much for a network this small "
                "(MobileNetV1_x0_25: 50.41 with 1e-4, 51.45 with 3e-5)"
            )
        if config.augment.crop is not None and config.augment.crop.scale[0] < 0.2:
            lines.append(
                f"augment.crop.scale: from {config.augment.crop.scale[0]:g} is much for a network this small "
                "(MobileNetV2_x0_25: 52.35 from 0.08, 53.18 from 0.2)"
            )
    return lines


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def against_infinity(config: TrainConfig) -> str:
    """What to do after gradients that are not finite, in arguments with which the same run folder goes on."""
    key, rate = ("lr.peak", config.lr.peak) if config.lr.peak is not None else ("lr.base", config.lr.base)
    return (
        f"go on with a lower rate (--{key}={(rate or 0.0) / 2:g} --run.allow_change='[\"{key}\"]'); or set "
        "engine.clip_grad_norm, or a longer lr.warmup.duration, likewise"
    )


def keys_to_turn(config: TrainConfig, verdict: Verdict) -> list[str]:
    """`key: now -> then` for each key that would help against overfitting or underfitting (PaddleClas, 2.2.8)."""
    decay, smoothing = config.optimizer.weight_decay, config.loss.label_smoothing
    crop, lines = config.augment.crop, []
    if verdict == "overfitting":
        lines.append(f"optimizer.weight_decay: {decay:g} -> {2 * decay or 1e-4:g}")
        if not smoothing:
            lines.append("loss.label_smoothing: 0 -> 0.1")
        if not config.mixing.mixup:
            lines.append("mixing.mixup: 0 -> 0.2")
        if config.augment.policy.name == OFF:
            lines.append("augment.policy.name: none -> randaugment")
        if crop is not None and crop.scale[0] > 0.08:
            lines.append(f"augment.crop.scale: from {crop.scale[0]:g} -> from 0.08")
    if verdict == "underfitting":
        if decay:
            lines.append(f"optimizer.weight_decay: {decay:g} -> {0.3 * decay:.2g}")
        if smoothing:
            lines.append(f"loss.label_smoothing: {smoothing:g} -> 0")
        lines += [
            f"mixing.{name}: {value:g} -> 0" for name in ("mixup", "cutmix") if (value := getattr(config.mixing, name))
        ]
        lines += [
            f"augment.{name}.name: {now} -> none"
            for name in ("policy", "erase")
            if (now := getattr(config.augment, name).name) != OFF
        ]
        if crop is not None and crop.scale[0] < 0.2:
            lines.append(f"augment.crop.scale: from {crop.scale[0]:g} -> from 0.2")
        lines.append("or a larger network, or a longer run")
    return lines
