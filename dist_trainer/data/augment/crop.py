"""Crops: random-resized in training, with a size that may grow over the run; of the centre in evaluation."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from dist_trainer.data.augment.strip import centre_of_resized, is_strip
from dist_trainer.draws import CROP, UInt64, uniform
from dist_trainer.errors import UserError
from dist_trainer.plan import Duration, DurationText, Plan


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
    start_size: int | None = None
    """Progressive resizing: pixels of each side at first, which grow to `size`; null: `size` throughout. A compiled
    network is compiled once for each size on the way."""
    grow: tuple[DurationText, DurationText] = ("35%", "85%")
    """When the size begins to grow and when it is reached, such as [5ep, 13ep]. It changes between epochs."""
    multiple_of: int = 32
    """Intermediate sizes are rounded to a multiple of this, to fit a network's strides."""

    def check(self) -> None:
        """Raises UserError for impossible crops."""
        for name in ("size", "start_size", "multiple_of"):
            value: Any = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"augment.crop.{name}: {value} is not a positive number of pixels")
        for name, (lo, hi), most in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < lo <= hi <= most:
                raise UserError(f"augment.crop.{name}: [{lo}, {hi}] is not an ascending pair in (0, {most:g}]")
        if self.start_size is not None and self.start_size > self.size:
            raise UserError(f"augment.crop.start_size: {self.start_size} is larger than augment.crop.size, {self.size}")


class Sizes:
    """Pixels of each side of a training image, epoch by epoch: a straight line, rounded (as FFCV's rn50 recipes)."""

    def __init__(self, config: CropConfig, plan: Plan) -> None:
        """Raises UserError for a growth that ends before it begins."""
        self._config = config
        start, end = (plan.steps(Duration.parse(each, "augment.crop.grow")) for each in config.grow)
        if start > end:
            raise UserError(f"augment.crop.grow: {config.grow[0]} comes after {config.grow[1]}")
        self._epochs = start / plan.steps_per_epoch, end / plan.steps_per_epoch

    def at(self, epoch: int) -> int:
        """The size in this epoch (from 0)."""
        first, last, step = self._config.start_size, self._config.size, self._config.multiple_of
        if first is None or epoch >= self._epochs[1]:
            return last
        size = float(np.interp(epoch, self._epochs, (first, last)))
        return first if size == first else min(last, max(first, round(size / step) * step))

    @property
    def all(self) -> set[int]:
        """All sizes of the run."""
        return {self.at(epoch) for epoch in range(math.ceil(self._epochs[1]) + 1)}


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


class CenterCrop:
    """The evaluation transform: resize the shorter side (bilinear, or bicubic), cut the centre. Either may be null."""

    def __init__(self, resize: int | None, crop: int | None, interpolation: str = "bilinear") -> None:
        self.crop, self._resize, self._interpolation = crop, resize, interpolation

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        steps = self._steps
        if self._resize and self.crop and is_strip(image):
            image, steps = centre_of_resized(image, self._resize, self.crop, self._interpolation), steps[1:]
        for step in steps:
            image = step(image)
        return image.contiguous()  # a view would keep the whole image until its batch is full

    @cached_property
    def _steps(self) -> list[Any]:
        steps: list[Any] = []
        if self._resize or self.crop:
            from torchvision.transforms import v2  # where it is used: that costs a process a second

            if self._resize:
                mode = v2.InterpolationMode("bicubic" if self._interpolation == "bicubic" else "bilinear")
                steps.append(v2.Resize(self._resize, mode, antialias=True))
            if self.crop:
                steps.append(v2.CenterCrop(self.crop))
        return steps
