"""The region decoder in C (jpeg_region.c), if it was built: at install time, with a compiler and jpeglib.h."""

import ctypes
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_jpeg_region.so")


def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """(the library or None, its version or why there is none)"""
    if not path.exists():
        return (
            None,
            "it is not built; with a C compiler and libjpeg-turbo's headers (Debian: gcc libjpeg-dev), pip "
            "install again",
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"it does not load ({error})"
    library.dist_trainer_libjpeg.restype = ctypes.c_char_p
    version = library.dist_trainer_libjpeg().decode()
    decode = library.dist_trainer_decode_region
    decode.argtypes = [
        ctypes.c_char_p, ctypes.c_ulong, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
        ctypes.c_void_p,
    ]  # fmt: skip
    return library, version


_library, version = _load(LIBRARY)
is_available = _library is not None


def decode_region(data: bytes, channels: int, box: tuple[int, int, int, int]) -> torch.Tensor | None:
    """uint8 [channels, height, width] of the box (left, top, width, height), the bits of a full decode.

    A view of memory that is [height, width, channels]. None where another decoder is needed: damaged data, CMYK, no
    JPEG, a box that leaves the image. Releases Python's lock.
    """
    if _library is None:
        return None
    left, top, width, height = box
    pixels = torch.empty((height, width, channels), dtype=torch.uint8)
    if _library.dist_trainer_decode_region(data, len(data), channels, left, top, width, height, pixels.data_ptr()):
        return None
    return pixels.permute(2, 0, 1)
