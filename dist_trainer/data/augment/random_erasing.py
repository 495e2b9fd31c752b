"""Random Erasing (Zhong et al. 2020): a box of random area and shape is filled; torchvision's transform."""

from collections.abc import Sequence
from typing import Any

import torch

from dist_trainer.errors import UserError


class RandomErasing:
    """With `probability`, fills a box with an area from `scale` (fraction of the image) and a shape from `ratio`."""

    def __init__(
        self,
        fill: torch.Tensor,
        *,
        probability: float = 0.5,
        scale: Sequence[float] = (0.02, 0.4),
        ratio: Sequence[float] = (0.3, 1 / 0.3),
        value: Any = None,
    ) -> None:
        """Defaults are PaddleClas's. Raises UserError for a `value`: noise would have another scale than the images."""
        from torchvision.transforms import v2

        if value is not None:
            raise UserError(
                f"augment.erase.args.value: {value!r}: erased pixels take the data set's mean, which is 0 after "
                "normalisation; noise would not have the images' scale. Remove it"
            )
        self._erase = v2.RandomErasing(probability, list(scale), list(ratio), fill.flatten().tolist())

    def __call__(self, image: torch.Tensor, epoch: float) -> torch.Tensor:
        found: torch.Tensor = self._erase(image)
        return found
