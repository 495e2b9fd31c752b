"""From a decoded, cropped image to one in a batch, as a pure function of (seed, epoch, sample id, copy)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dist_trainer.by_name import Named, build, check_args
from dist_trainer.data.augment.crop import CropConfig, Sizes
from dist_trainer.data.augment.cutout import Cutout
from dist_trainer.data.augment.grid_mask import GridMask
from dist_trainer.data.augment.hide_and_seek import HideAndSeek
from dist_trainer.data.augment.policy import OFF, OnPil
from dist_trainer.data.augment.random_erasing import RandomErasing
from dist_trainer.data.stages import seed_all
from dist_trainer.draws import AUGMENT, FLIP, UInt64, hashes, uniform
from dist_trainer.errors import UserError, nearest
from dist_trainer.plan import Duration, Plan

Transform = Callable[[torch.Tensor], torch.Tensor]
Erase = Callable[[torch.Tensor, float], torch.Tensor]

ERASERS: dict[str, Callable[..., Erase]] = {
    "random_erasing": RandomErasing,
    "cutout": Cutout,
    "grid_mask": GridMask,
    "hide_and_seek": HideAndSeek,
}


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images, in this order after the crop; the flip comes last."""

    crop: CropConfig | None = None
    """Null: no crop; then all images must have the same size."""
    flip: float = 0.5
    """Probability of a mirror image."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation by factors from [1 - j, 1 + j]; 0.4 is usual, 0 is off."""
    policy: Named = field(default_factory=lambda: Named(name=OFF))
    """none; autoaugment, randaugment, trivialaugment or augmix, with torchvision's args; or timm's notation, such as
    rand-m9-mstd0.5-inc1, augmix-m3, 3a."""
    transforms: list[Named] = field(default_factory=list)
    """More per-image transforms: a torchvision v2 class by name, or package.module:Name, on uint8 [C, H, W]."""
    erase: Named = field(default_factory=lambda: Named(name=OFF))
    """none, random_erasing, cutout, grid_mask or hide_and_seek: parts of the image take the data set's mean. Lengths in
    args are pixels of an image of 224 and scale with it; grid_mask's ramp is a duration, as 80%."""
    repeats: int = 1
    """Copies of each sample in a batch (repeated augmentation, Hoffer et al. 2020), in different micro-batches; an
    epoch then covers one in `repeats` samples."""


class Augment:
    """The training transform. All draws use one key per sample, which does not depend on ranks or workers."""

    def __init__(self, config: AugmentConfig, seed: int, plan: Plan, mean: Sequence[float]) -> None:
        """`mean`: per channel, of pixels in [0, 1]. Raises UserError for impossible settings."""
        if not 0.0 <= config.flip <= 1.0:
            raise UserError(f"augment.flip: {config.flip} is not a probability")
        self.crop, self._flip, self._seed, self._plan = config.crop, config.flip, seed, plan
        self._sizes: Sizes | None = None
        self.interpolation = config.crop.interpolation if config.crop is not None else "bilinear"
        if config.crop is not None:
            config.crop.check()
            self._sizes = Sizes(config.crop, plan)
        fill = [round(255 * each) for each in mean]
        on_pil = OnPil(config.color_jitter, config.policy, fill)
        steps = [
            build(f"augment.transforms[{number}]", named, vars(_torchvision()), kind="transform")
            for number, named in enumerate(config.transforms)
        ]
        self._steps: list[Transform] = [*([on_pil] if on_pil else []), *steps]
        self._keeps_size = not steps
        self._erase = _eraser(config.erase, torch.tensor(fill, dtype=torch.uint8)[:, None, None], plan)
        others = on_pil.is_timms or any(":" in named.name for named in config.transforms)
        self._seed_step = seed_all if others else _seed_torch

    @property
    def last_step(self) -> int:
        """The run's last step, when images are largest and most augmented."""
        return self._plan.total_steps - 1

    @property
    def sizes(self) -> set[int]:
        """Pixels on each side of images over the run, if they are known."""
        return self._sizes.all if self._sizes is not None and self._keeps_size else set()

    def size(self, step: int) -> int | None:
        """Pixels on each side of the crops of a step, or None without crops: those of its first sample's epoch."""
        return None if self._sizes is None else self._sizes.at(self.epoch(step))

    def epoch(self, step: int) -> int:
        """The epoch of the first sample of `step`."""
        return int(self._plan.epoch(step))

    def keys(self, epochs: np.ndarray, ids: np.ndarray, copy: int) -> UInt64:
        """One key (uint64) per sample, of (seed, epoch, sample id, copy)."""
        return hashes(hashes(ids, AUGMENT, self._seed, copy) ^ epochs.astype(np.uint64), AUGMENT)

    def transform(self, image: torch.Tensor, sample_key: int, step: int) -> torch.Tensor:
        """uint8 [C, H, W] to the same type. Changes the state of the random generators."""
        if self._steps or self._erase is not None:
            self._seed_step(sample_key)
        for each in self._steps:
            image = each(image)
        return image if self._erase is None else self._erase(image, self._plan.epoch(step))

    def flips(self, keys: UInt64) -> np.ndarray:
        """Which samples are mirrored (bool, one per key)."""
        return uniform(keys, FLIP) < self._flip


def _eraser(named: Named, fill: torch.Tensor, plan: Plan) -> Erase | None:
    """Raises UserError for unknown names or arguments."""
    if named.name == OFF:
        return None
    if named.name not in ERASERS:
        hint = nearest(named.name, [OFF, *ERASERS])
        raise UserError(f"augment.erase.name: {named.name!r} is not one of none, {', '.join(ERASERS)}{hint}")
    target, args = ERASERS[named.name], dict(named.args)
    if "fill" in args:
        raise UserError(f"augment.erase.args.fill: {args['fill']!r}: erased pixels take the data set's mean; remove it")
    check_args("augment.erase", named.name, target, args, fill)
    if not 0.0 <= args.get("probability", 1.0) <= 1.0:
        raise UserError(f"augment.erase.args.probability: {args['probability']} is not a probability")
    if "ramp" in args:
        args["ramp"] = plan.steps(Duration.parse(str(args["ramp"]), "augment.erase.args.ramp")) / plan.steps_per_epoch
    try:
        return target(fill, **args)
    except (TypeError, ValueError) as error:
        raise UserError(f"augment.erase.args: {named.name}: {error}") from None


def _seed_torch(seed: int) -> None:
    """Seed the generator that torchvision's transforms use. torch.manual_seed would cost 79 us, this 1."""
    torch.default_generator.manual_seed(seed)


def _torchvision() -> Any:
    """torchvision's transforms v2, imported where they are used: that costs a loader process two seconds."""
    import torchvision.transforms.v2

    return torchvision.transforms.v2
