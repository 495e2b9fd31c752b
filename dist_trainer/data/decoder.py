"""From the bytes of a sample, or what a stage has made of them, to its pixels, as the config has it."""

import numpy as np
import torch

from dist_trainer.data.config import DataConfig
from dist_trainer.data.decode import Box, decode, decode_region
from dist_trainer.data.exif import orientation, stored_box, upright
from dist_trainer.data.read import Bad

Encoded = bytes | torch.Tensor | Bad
"""An encoded image, pixels that a stage has put there (uint8 [C, H, W]), or a sample that cannot be used."""


class Decoder:
    """data.channels, data.exif and data.max_pixels."""

    def __init__(self, config: DataConfig) -> None:
        self._channels, self._max_pixels, self._turns = config.channels, config.max_pixels, config.exif == "apply"

    def __call__(self, data: Encoded, box: Box | None = None) -> torch.Tensor | Bad:
        """uint8 [C, H, W], or of the box alone (left, top, width, height, in the image as it is to be seen)."""
        if isinstance(data, Bad):
            return data
        if isinstance(data, torch.Tensor):
            return data if box is None else data[:, box[1] : box[1] + box[3], box[0] : box[0] + box[2]]
        try:
            if not self._turns:
                return decode(data, self._channels) if box is None else decode_region(data, self._channels, box)
            turned, width, height = orientation(data)
            if box is None:
                return upright(decode(data, self._channels), turned)
            return upright(decode_region(data, self._channels, stored_box(box, turned, width, height)), turned)
        except ValueError as error:
            return Bad("decode", str(error))

    def too_large(self, width: int, height: int) -> Bad | None:
        """For an image of this size, by the index: it is not even read."""
        if width * height <= self._max_pixels:
            return None
        return Bad("decode", f"{width:,} x {height:,} pixels are more than data.max_pixels, {self._max_pixels:,}")

    def sizes(self, data: list[Encoded], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(widths, heights), int64 [m] each, 1 at least, of images as they are to be seen; `rows`: the index's."""
        widths, heights = (np.maximum(rows[name].astype(np.int64), 1) for name in ("width", "height"))
        for position, each in enumerate(data):
            if isinstance(each, torch.Tensor):
                heights[position], widths[position] = each.shape[1:]
            elif self._turns and isinstance(each, bytes) and _lies(each):
                heights[position], widths[position] = widths[position], heights[position]
        return widths, heights


def _lies(data: bytes) -> bool:
    """Whether width and height change places when the image is turned."""
    try:
        return orientation(data)[0] >= 5
    except ValueError:  # said when it is decoded
        return False
