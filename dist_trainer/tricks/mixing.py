"""Mixup and CutMix: every image of a micro-batch is mixed with another one, and their targets likewise.

Not torchvision's classes: they do not tell how much was mixed, which sample weights and losses of labels need, and they
draw from torch's global generator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_trainer.draws import MIX, key
from dist_trainer.errors import UserError
from dist_trainer.plan import Duration, DurationText, Plan


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Mixup and CutMix of training images, drawn once per micro-batch. Each is off at 0."""

    mixup: float = 0.0
    """Mixup (Zhang et al. 2018): images are averaged, by shares from Beta(a, a) with this a; 0.2 is usual."""
    cutmix: float = 0.0
    """CutMix (Yun et al. 2019): a box of area 1 - s comes from another image, s from Beta(a, a) with this a; 1.0 is
    usual."""
    switch: float = 0.5
    """Probability of CutMix instead of Mixup, where both are on."""
    probability: float = 1.0
    """Probability that a micro-batch is mixed."""
    off_last: DurationText = "0ep"
    """Do not mix in the last part of the run, of this length."""


@dataclass(frozen=True)
class Mix:
    """What was drawn for one micro-batch: sample i keeps `share` of itself and has the rest of sample i - `shift`.

    A share of 1 mixes nothing.
    """

    share: float = 1.0
    shift: int = 0
    box: tuple[int, int, int, int] | None = None
    """CutMix: top, bottom, left, right in pixels, clipped at the image's edges. None: Mixup."""

    def partners(self, values: torch.Tensor) -> torch.Tensor:
        """[m, ...] to the same of each sample's partner, in the same memory layout."""
        return torch.cat([values[-self.shift :], values[: -self.shift]])

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """[m, C, H, W], float or uint8 (rounded), to the same type and layout; `images` stay as they are."""
        if self.share == 1.0:
            return images
        if self.box is not None:
            top, bottom, left, right = self.box
            mixed = images.clone()
            mixed[..., top:bottom, left:right] = self.partners(images[..., top:bottom, left:right])
            return mixed
        if not images.is_floating_point():
            return self.images(images.float()).round_().to(images.dtype)
        return torch.lerp(self.partners(images), images, self.share)


class Mixing:
    """`draw` is a pure function of (seed, step, slot): the same on every world and device, and after a resume."""

    def __init__(self, config: MixingConfig, plan: Plan, seed: int, side: int | None = None) -> None:
        """`side`: pixels of the images' shorter side, if it is known. Raises UserError for impossible settings."""
        for name in ("mixup", "cutmix"):
            alpha = getattr(config, name)
            if not 0.0 <= alpha < math.inf:
                raise UserError(
                    f"mixing.{name}: {alpha} is not a parameter of Beta(a, a); give 0 to turn it off, or 0.2"
                )
            if alpha and plan.micro_batch == 1:
                raise UserError(f"mixing.{name}: {alpha} mixes the samples of a micro-batch; batch.micro_batch is 1")
        for name in ("switch", "probability"):
            if not 0.0 <= getattr(config, name) <= 1.0:
                raise UserError(f"mixing.{name}: {getattr(config, name)} is not a probability")
        if config.cutmix and side == 1:
            raise UserError(f"mixing.cutmix: {config.cutmix} cuts boxes, and the images are one pixel wide or high")
        self.num_steps = plan.total_steps - round(plan.steps(Duration.parse(config.off_last, "mixing.off_last")))
        """Steps from the start that are mixed."""
        if (config.mixup or config.cutmix) and self.num_steps <= 0:
            raise UserError(f"mixing.off_last: {config.off_last} is the whole run of {plan.total_steps} steps")
        self._config, self._seed = config, seed

    @property
    def is_on(self) -> bool:
        """Whether any micro-batch may be mixed."""
        return bool(self._config.mixup or self._config.cutmix)

    def draw(self, step: int, slot: int, shape: Sequence[int]) -> Mix:
        """How slot `slot` of step `step` is mixed; `shape` is that of its images, [m, C, H, W]."""
        config, (size, _, height, width) = self._config, shape
        if step >= self.num_steps or not self.is_on:
            return Mix()
        # RandomState and Philox are what NumPy promises never to change.
        random = np.random.RandomState(np.random.Philox(key=key(MIX, self._seed, step, slot)))
        mixed, cut = random.random_sample(2) < (config.probability, config.switch)
        if not mixed:
            return Mix()
        # Not always the neighbour: with data.order: none that would always be the same sample.
        shift = int(random.randint(1, size))
        if config.mixup and not (config.cutmix and cut):
            return Mix(float(random.beta(config.mixup, config.mixup)), shift)
        share = float(random.beta(config.cutmix, config.cutmix))
        top, bottom = _edges(random.randint(height), height, share)
        left, right = _edges(random.randint(width), width, share)
        return Mix(1.0 - (bottom - top) * (right - left) / (height * width), shift, (top, bottom, left, right))


def _edges(centre: int, side: int, share: float) -> tuple[int, int]:
    """Where a box of sqrt(1 - share) of `side` begins and ends (Yun et al. 2019, equation 2), clipped."""
    length = int(side * math.sqrt(1.0 - share))
    start = int(centre) - length // 2
    return max(start, 0), min(start + length, side)
