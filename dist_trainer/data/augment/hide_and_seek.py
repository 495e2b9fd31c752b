"""Hide-and-Seek (Kumar Singh & Lee 2017): each cell of a grid is filled with some probability."""

from collections.abc import Sequence

import torch

from dist_trainer.data.augment.scale import scaled


class HideAndSeek:
    """A cell side is drawn from `sizes`, in pixels of an image of 224; 0 hides nothing. Each cell is hidden or not.

    Of the pixels 1 - `hidden` (1 - share of zeros among `sizes`) are kept: 60%.
    """

    def __init__(
        self,
        fill: torch.Tensor,
        *,
        sizes: Sequence[int] = (0, 16, 32, 44, 56),
        hidden: float = 0.5,
        probability: float = 1.0,
    ) -> None:
        """Defaults are the paper's and PaddleClas's."""
        if not sizes or min(sizes) < 0:
            raise ValueError(f"sizes {list(sizes)} are not cell sides of 0 or more pixels")
        if not 0.0 <= hidden <= 1.0:
            raise ValueError(f"hidden {hidden} is not a probability")
        self._fill, self._sizes, self._hidden, self._probability = fill, sizes, hidden, probability

    def __call__(self, image: torch.Tensor, epoch: float) -> torch.Tensor:
        draw, choice = torch.rand(2).tolist()
        size = self._sizes[int(choice * len(self._sizes))]
        if draw >= self._probability or not size:
            return image
        side = max(1, scaled(size, image))
        height, width = image.shape[1:]
        cells = torch.rand(-(-height // side), -(-width // side)) < self._hidden
        hidden = cells.repeat_interleave(side, 0)[:height].repeat_interleave(side, 1)[:, :width]
        return torch.where(hidden, self._fill, image)
