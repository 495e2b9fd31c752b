"""What happens to one image before it stands in a batch, as a pure function of (seed, epoch, sample id, copy)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as transforms

from dist_trainer.errors import UserError
from dist_trainer.keyed import AUGMENT, FLIP, key, uniform
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


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What happens to training images."""

    crop: CropConfig | None = None
    """Null leaves images as they are; then all must have one size."""
    flip: float = 0.5
    """Probability of a mirror image."""
    transforms: list[Named] = field(default_factory=list)
    """More per-image transforms: a torchvision v2 class by name, or package.module:Name, on uint8 [C, H, W]."""


class Augment:
    """The training transform. `flips` is vectorised; the rest draws from torch's generator, seeded per sample."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        if not 0.0 <= config.flip <= 1.0:
            raise UserError(f"augment.flip: {config.flip} is not a probability")
        self._flip, self._seed = config.flip, seed
        self._steps: list[Transform] = []
        if config.crop is not None:
            if config.crop.size < 1:
                raise UserError(f"augment.crop.size: {config.crop.size} is not a positive number of pixels")
            for name, (lo, hi), most in (("scale", config.crop.scale, 1.0), ("ratio", config.crop.ratio, math.inf)):
                if not 0 < lo <= hi <= most:
                    raise UserError(f"augment.crop.{name}: [{lo}, {hi}] is not an ascending pair in (0, {most:g}]")
            self._steps.append(
                transforms.RandomResizedCrop(
                    config.crop.size, scale=config.crop.scale, ratio=config.crop.ratio, antialias=True
                )
            )
        for number, named in enumerate(config.transforms):
            self._steps.append(build(f"augment.transforms[{number}]", named, vars(transforms), kind="transform"))

    def __call__(self, image: torch.Tensor, epoch: int, sample: int, copy: int = 0) -> torch.Tensor:
        """uint8 [C, H, W] to the same type; leaves torch's default generator in a state that nothing may rely on."""
        if self._steps:
            # default_generator.manual_seed costs 1 us, torch.manual_seed 79.
            torch.default_generator.manual_seed(key(AUGMENT, self._seed, epoch, sample, copy))
            for step in self._steps:
                image = step(image)
        return image

    def flips(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` are mirrored (bool, one per id)."""
        return uniform(ids, FLIP, self._seed, epoch) < self._flip


class CenterCrop:
    """The evaluation transform: resize the shorter side, cut the centre. Either may be null."""

    def __init__(self, resize: int | None, crop: int | None) -> None:
        steps: Sequence[Any] = [
            *([transforms.Resize(resize, antialias=True)] if resize else []),
            *([transforms.CenterCrop(crop)] if crop else []),
        ]
        self._steps = steps

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        for step in self._steps:
            image = step(image)
        return image
