"""Colour jitter and the learned or random policies, on PIL: torchvision's AutoAugment, RandAugment, TrivialAugment and
AugMix, or timm's by its notation.

Policies on PIL images, both conversions included, take 0.55 to 0.86 of their time on tensors (benchmarks/augment.py).
Jitter alone takes 1.3 of it, but uses integers here: on tensors contrast needs the mean, a sum of floats whose last bit
depends on the processor. Areas that a rotation or shear leaves empty get the data set's mean.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from dist_trainer.by_name import Named, build
from dist_trainer.data.augment.timm_policy import is_timms, timm_policy
from dist_trainer.errors import UserError

OFF = "none"


def _policies() -> dict[str, Callable[..., Any]]:
    from torchvision.transforms import v2

    def autoaugment(policy: str = "imagenet", **args: Any) -> Any:
        """Cubuk et al. 2019; `policy`: imagenet, cifar10 or svhn."""
        return v2.AutoAugment(v2.AutoAugmentPolicy(policy), **args)

    return {
        "augmix": v2.AugMix,
        "autoaugment": autoaugment,
        "randaugment": v2.RandAugment,
        "trivialaugment": v2.TrivialAugmentWide,
    }


def _check_magnitudes(built: Any, policy: Named) -> None:
    """torchvision would say so at the first image that draws such an operation."""
    bins = getattr(built, "num_magnitude_bins", None)
    if bins is not None and bins < 1:
        raise UserError(f"augment.policy.args.num_magnitude_bins: {bins} is not 1 or more; {policy.name} has 31")
    magnitude = getattr(built, "magnitude", None)
    if bins is not None and magnitude is not None and not 0 <= magnitude < bins:
        raise UserError(f"augment.policy.args.magnitude: {magnitude} is not in 0 to {bins - 1}; 9 is usual")


class OnPil:
    """uint8 [C, H, W] through transforms as a PIL image. torchvision's draw from torch's default generator."""

    def __init__(self, jitter: float, policy: Named, fill: Sequence[int]) -> None:
        """Raises UserError for unknown names and impossible values."""
        if not 0.0 <= jitter < 1.0:
            raise UserError(f"augment.color_jitter: {jitter} is not in [0, 1); 0.4 is usual")
        self._steps: list[Any] = []
        if jitter:
            from torchvision.transforms import v2  # where it is used: that costs a loader process two seconds

            self._steps.append(v2.ColorJitter(jitter, jitter, jitter))
        self.is_timms = is_timms(policy.name)
        """Whether it draws from Python's and NumPy's generators, too."""
        if self.is_timms:
            if policy.args:
                raise UserError(f"augment.policy.args: {policy.args}: {policy.name} says all in its name; remove them")
            self._steps.append(timm_policy(policy.name, fill))
        elif policy.name != OFF:
            args = {"fill": list(fill), **policy.args}
            built = build("augment.policy", Named(name=policy.name, args=args), _policies(), kind="policy")
            _check_magnitudes(built, policy)
            self._steps.append(built)

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        picture: Any = Image.fromarray(pixels.contiguous().numpy())
        for step in self._steps:
            picture = step(picture)
        found = torch.from_numpy(np.array(picture))
        return found[None] if found.dim() == 2 else found.permute(2, 0, 1)
