"""EXIF's orientation: how a camera was held."""

import io
import warnings

import torch

from dist_trainer.data.pillow import Image

_TAG = 0x0112
Box = tuple[int, int, int, int]
"""left, top, width, height in pixels"""
_FLIPS = {1: (), 2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}
"""By orientation: which axes of [C, H, W] are reversed, after the transposition that 5 to 8 begin with."""


def orientation(data: bytes) -> tuple[int, int, int]:
    """(orientation 1 to 8, width, height as stored) of an encoded image; 1 where none is said.

    Raises ValueError for what is no image.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            found = image.getexif().get(_TAG, 1)
            return (found if found in _FLIPS else 1), *image.size
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise ValueError(f"not a readable image ({error})") from None


def orientation_alone(turned: int) -> dict[str, Image.Exif]:
    """Arguments of Pillow's `save` for an image that is stored turned."""
    if turned == 1:
        return {}
    exif = Image.Exif()
    exif[_TAG] = turned
    return {"exif": exif}


def upright(image: torch.Tensor, turned: int) -> torch.Tensor:
    """[C, H, W] as it is to be seen: the pixels of Pillow's `ImageOps.exif_transpose`."""
    if turned >= 5:
        image = image.transpose(1, 2)
    return image.flip(_FLIPS[turned]) if _FLIPS[turned] else image


def stored_box(box: Box, turned: int, width: int, height: int) -> Box:
    """Where the box of an upright image lies in the stored one, which has `width` x `height` pixels."""
    left, top, box_width, box_height = box
    upright_width, upright_height = (height, width) if turned >= 5 else (width, height)
    if 2 in _FLIPS[turned]:
        left = upright_width - left - box_width
    if 1 in _FLIPS[turned]:
        top = upright_height - top - box_height
    return (top, left, box_height, box_width) if turned >= 5 else (left, top, box_width, box_height)
