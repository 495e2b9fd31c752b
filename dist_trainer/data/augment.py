"""What happens to an image before it stands in a batch, as a pure function of (seed, epoch, sample id, copy)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from dist_trainer.data.stages import seed_all
from dist_trainer.errors import UserError
from dist_trainer.keyed import AUGMENT, CROP, FLIP, UInt64, hashes, uniform
from dist_trainer.named import Named, build

Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Random-resized crop (Szegedy et al. 2015): a box of random area and shape, resized to a square."""

    size: int
    """Pixels of each side."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the box, as a fraction of the image's."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width over height of the box, drawn log-uniformly."""
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """How the box is resized, antialiased; auto: bilinear, or as data.preprocess says."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What happens to training images."""

    crop: CropConfig | None = None
    """Null leaves images as they are; then all must have one size."""
    flip: float = 0.5
    """Probability of a mirror image."""
    repeats: int = 1
    """Copies of each sample in a batch (repeated augmentation, Hoffer et al. 2020), in different micro-batches; an
    epoch then covers one in `repeats` samples."""
    transforms: list[Named] = field(default_factory=list)
    """More per-image transforms: a torchvision v2 class by name, or package.module:Name, on uint8 [C, H, W]."""


def crop_boxes(config: CropConfig, widths: np.ndarray, heights: np.ndarray, keys: UInt64) -> np.ndarray:
    """int64 [m, 4] (left, top, width, height): random-resized crops of images of `widths` x `heights` [m].

    Area uniform in `scale`, log of the shape uniform in `ratio`, placed uniformly; the first of ten draws that fits,
    or else the largest centred box of a shape nearest to the image's, as torchvision's RandomResizedCrop draws them.
    """
    tries = np.arange(10)
    width, height = widths[:, None].astype(np.float64), heights[:, None].astype(np.float64)
    many = keys[:, None] + tries.astype(np.uint64)[None]
    low, high = np.log(config.ratio)
    area = width * height * (config.scale[0] + (config.scale[1] - config.scale[0]) * uniform(many, CROP, 0))
    ratio = np.exp(low + (high - low) * uniform(many, CROP, 1))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(1)
    rows = np.arange(len(keys))
    w, h, width, height = w[rows, first], h[rows, first], width[:, 0], height[:, 0]
    left = np.floor(uniform(keys, CROP, 2) * (width - w + 1))
    top = np.floor(uniform(keys, CROP, 3) * (height - h + 1))
    shape = np.clip(width / height, *config.ratio)
    whole_w, whole_h = np.minimum(width, np.rint(height * shape)), np.minimum(height, np.rint(width / shape))
    none = ~fits.any(1)
    w, h = np.where(none, whole_w, w), np.where(none, whole_h, h)
    left, top = np.where(none, (width - w) // 2, left), np.where(none, (height - h) // 2, top)
    return np.stack([left, top, w, h], 1).astype(np.int64)


class Augment:
    """The training transform: everything is drawn under one key per sample, which no rank or worker enters."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        if not 0.0 <= config.flip <= 1.0:
            raise UserError(f"augment.flip: {config.flip} is not a probability")
        self.crop, self._flip, self._seed = config.crop, config.flip, seed
        if config.crop is not None:
            if config.crop.size < 1:
                raise UserError(f"augment.crop.size: {config.crop.size} is not a positive number of pixels")
            for name, (lo, hi), most in (("scale", config.crop.scale, 1.0), ("ratio", config.crop.ratio, math.inf)):
                if not 0 < lo <= hi <= most:
                    raise UserError(f"augment.crop.{name}: [{lo}, {hi}] is not an ascending pair in (0, {most:g}]")
        self.size = config.crop.size if config.crop is not None and not config.transforms else None
        """Pixels on each side of what comes out, where that is certain."""
        self._seed_step = seed_all if any(":" in named.name for named in config.transforms) else _seed_torch
        self._steps: list[Transform] = [
            build(f"augment.transforms[{number}]", named, vars(_torchvision()), kind="transform")
            for number, named in enumerate(config.transforms)
        ]

    def keys(self, epochs: np.ndarray, ids: np.ndarray, copy: int) -> UInt64:
        """One key (uint64) per sample, of (seed, epoch, sample id, copy)."""
        return hashes(hashes(ids, AUGMENT, self._seed, copy) ^ epochs.astype(np.uint64), AUGMENT)

    def transform(self, image: torch.Tensor, sample_key: int) -> torch.Tensor:
        """uint8 [C, H, W] to the same type; leaves random generators in a state that nothing may rely on."""
        if self._steps:
            self._seed_step(sample_key)
            for step in self._steps:
                image = step(image)
        return image

    def flips(self, keys: UInt64) -> np.ndarray:
        """Which samples are mirrored (bool, one per key)."""
        return uniform(keys, FLIP) < self._flip


def _seed_torch(seed: int) -> None:
    """All that torchvision's transforms draw from. torch.manual_seed would cost 79 us, this 1."""
    torch.default_generator.manual_seed(seed)


def _torchvision() -> Any:
    """torchvision's transforms v2, imported where they are used: that costs a loader process two seconds."""
    import torchvision.transforms.v2

    return torchvision.transforms.v2


class CenterCrop:
    """The evaluation transform: resize the shorter side (bicubic, or bilinear), cut the centre. Either may be null."""

    def __init__(self, resize: int | None, crop: int | None, interpolation: str = "bilinear") -> None:
        self.crop = crop
        self._steps: list[Any] = []
        if resize:
            mode = _torchvision().InterpolationMode("bicubic" if interpolation == "bicubic" else "bilinear")
            self._steps.append(_torchvision().Resize(resize, interpolation=mode, antialias=True))
        if crop:
            self._steps.append(_torchvision().CenterCrop(crop))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        for step in self._steps:
            image = step(image)
        return image
