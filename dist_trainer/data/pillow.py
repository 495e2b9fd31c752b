"""Pillow as it is used here: its own limit on pixels is off, since data.max_pixels is the one limit."""

from PIL import Image

Image.MAX_IMAGE_PIXELS = None

__all__ = ["Image"]
