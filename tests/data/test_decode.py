"""Pixels of images and of regions of images, against Pillow and torchvision's full decode, bit for bit."""

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as transforms
from PIL import Image
from running import ROOT
from torchvision.io import ImageReadMode, decode_jpeg

from dist_trainer.data import decode as room
from dist_trainer.data import jpeg_region
from dist_trainer.data.decode import decode, decode_region, decoder_line, resize

built = pytest.mark.skipif(not jpeg_region.is_available, reason="the region decoder is not built")
MODES = {3: ImageReadMode.RGB, 1: ImageReadMode.GRAY}


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours with noise: every coefficient of a block is in use."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin(x / 7 + y / 11), 128 + 100 * np.cos(x / 5 - y / 9), (x * 3 + y * 5) % 256]
    noise = np.random.default_rng(0).normal(0, 20, (height, width, 3))
    return Image.fromarray((np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(data: bytes) -> bytes:
    """4:2:2 to 4:4:0: width and height change places, and so do luma's sampling factors; as many blocks follow."""
    at = data.index(b"\xff\xc0")
    size, luma = data[at + 5 : at + 9], at + 11
    assert data[luma] == 0x21
    return data[: at + 5] + size[2:] + size[:2] + data[at + 9 : luma] + b"\x12" + data[luma + 1 :]


JPEGS = {
    "4:2:0": lambda image: encoded(image, "JPEG", quality=90, subsampling=2),
    "4:2:2": lambda image: encoded(image, "JPEG", quality=90, subsampling=1),
    "4:4:0": lambda image: turned(encoded(image.resize((48, 80)), "JPEG", quality=90, subsampling=1)),
    "4:4:4": lambda image: encoded(image, "JPEG", quality=95, subsampling=0),
    "progressive": lambda image: encoded(image, "JPEG", progressive=True),
    "restarts": lambda image: encoded(image, "JPEG", restart_marker_blocks=3),
    "grey": lambda image: encoded(image.convert("L"), "JPEG"),
}
SIZES = [(1, 1), (7, 5), (16, 16), (17, 33), (101, 99), (250, 187)]


def boxes(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """The whole, single pixels in the corners, strips along the edges, and some in between."""
    yield 0, 0, width, height
    yield from ((x, y, 1, 1) for x in (0, width - 1) for y in (0, height - 1))
    yield from ((0, height // 2, width, 1), (width // 2, 0, 1, height))
    rng = np.random.default_rng(width * height)
    for _ in range(12):
        w, h = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
        yield int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h


@built
@pytest.mark.parametrize("kind", JPEGS)
def test_a_region_has_the_bits_of_the_full_decode(kind: str) -> None:
    """torchvision's and Pillow's, for every box. Fails when the guard is narrowed to 0, or R and B change places."""
    for size in SIZES:
        data = JPEGS[kind](picture(*size))
        for channels, mode in MODES.items():
            full = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
            with Image.open(io.BytesIO(data)) as opened:
                peer = np.array(opened.convert("RGB" if channels == 3 else "L")).reshape(*full.shape[1:], channels)
            if channels == 3:
                assert np.array_equal(full.permute(1, 2, 0).numpy(), peer)
            for box in boxes(full.shape[2], full.shape[1]):
                left, top, width, height = box
                region = jpeg_region.decode_region(data, channels, box)
                assert region is not None
                assert torch.equal(region, full[:, top : top + height, left : left + width]), (size, box)


@pytest.mark.parametrize("library", [True, False], ids=["built", "not built"])
def test_a_crop_has_the_same_bits_with_and_without_the_library(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """decode_region and resize against torchvision alone. Fails when a path resizes or rounds in its own way."""
    if not library:
        monkeypatch.setattr(jpeg_region, "_library", None)
    data = JPEGS["4:2:0"](picture(250, 187))
    full = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    for left, top, width, height in boxes(250, 187):
        part = full[:, top : top + height, left : left + width]
        region = decode_region(data, 3, (left, top, width, height))
        assert torch.equal(region, part)
        for size in ((32, 32), (224, 224), (7, 50)):
            assert torch.equal(resize(region, size), transforms.resize(part, list(size), antialias=True))


@built
def test_damaged_and_foreign_data_are_left_to_the_other_decoders() -> None:
    """None for what the region decoder must not guess at; never a crash. Fails when warnings are passed over."""
    whole = JPEGS["4:2:0"](picture(101, 99))
    cmyk = encoded(picture(40, 30).convert("CMYK"), "JPEG")
    box = (0, 0, 20, 20)
    for data in (whole[: len(whole) // 4], whole[:100], whole[:3], b"\xff\xd8" + bytes(500), cmyk):
        assert jpeg_region.decode_region(data, 3, box) is None
    for outside in ((0, 0, 102, 1), (0, 0, 1, 100), (101, 0, 1, 1), (-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 1)):
        assert jpeg_region.decode_region(whole, 3, outside) is None
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 5):
            broken[place] = rng.integers(0, 256)
        jpeg_region.decode_region(bytes(broken), 3, (30, 40, 50, 50))
    region = decode_region(cmyk, 3, (3, 4, 20, 10))
    with Image.open(io.BytesIO(cmyk)) as opened:
        peer = np.array(opened.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(region.numpy(), peer[:, 4:14, 3:23])


def test_damaged_pngs_are_refused_and_do_not_end_the_process() -> None:
    """torchvision's own decoder dies of them. Fails when PNGs go to it: pytest ends then."""
    data = encoded(picture(28, 28), "PNG")
    for broken in (data[:60] + bytes(len(data) - 60), data[:200], data[:33]):
        with pytest.raises(ValueError, match="not a readable image"):
            decode(broken, 1)


LEVELS = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG RGB", "PNG RGBA", "PNG L", "PNG P", "JPEG L", "JPEG CMYK", "WEBP RGB"])
def test_every_kind_of_image_arrives_as_pillow_decodes_it(kind: str) -> None:
    """uint8, with the channels asked for; grey to rounding. Fails when a decoder's own choice gets through."""
    name, mode = kind.split()
    data = encoded(Image.fromarray(LEVELS).convert(mode), name)
    for channels, target, rounding in ((3, "RGB", 0), (1, "L", 1)):
        image = decode(data, channels)
        assert (image.dtype, tuple(image.shape)) == (torch.uint8, (channels, 8, 9))
        with Image.open(io.BytesIO(data)) as opened:
            peer = np.array(opened.convert(target), int).reshape(8, 9, channels).transpose(2, 0, 1)
        assert np.abs(image.numpy() - peer).max() <= rounding


def test_sixteen_bits_are_scaled_to_eight() -> None:
    """257 x level is `level` in 16 bits. Fails when Pillow's own conversion gets through, which clamps."""
    grey = LEVELS[:, :, 0]
    data = encoded(Image.fromarray(grey * np.uint16(257)), "PNG")
    for channels in (1, 3):
        image = decode(data, channels)
        assert (image.dtype, tuple(image.shape)) == (torch.uint8, (channels, 8, 9))
        assert np.abs(image.numpy().astype(int) - grey).max() <= 1


def test_the_line_at_the_start_names_the_path_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a missing library is not said."""
    monkeypatch.setattr(room.jpeg_region, "is_available", True)
    monkeypatch.setattr(room.jpeg_region, "version", "libjpeg-turbo 9")
    assert decoder_line() == "JPEG: region decode, libjpeg-turbo 9"
    library, reason = jpeg_region._load(Path("/nowhere/at/all.so"))
    assert library is None
    monkeypatch.setattr(room.jpeg_region, "is_available", False)
    monkeypatch.setattr(room.jpeg_region, "version", reason)
    assert "not built" in decoder_line()


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_an_install_without_a_compiler_goes_on(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hook warns and builds a pure wheel. Fails when a missing compiler raises, or a half-built library stays."""
    pytest.importorskip("hatchling")
    specification = importlib.util.spec_from_file_location("hook", ROOT / "hatch_build.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    (tmp_path / module.FOLDER).mkdir(parents=True)
    monkeypatch.setenv("CC", compiler)
    build_data: dict[str, Any] = {"artifacts": []}
    hook = SimpleNamespace(root=str(tmp_path), target_name="wheel")
    module.RegionDecoder.initialize(hook, "standard", build_data)
    assert build_data == {"artifacts": []}
    assert "is not built" in capsys.readouterr().err
    assert list((tmp_path / module.FOLDER).iterdir()) == []
