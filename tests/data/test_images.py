"""Images as people have them: turned by EXIF, of extreme shape, too large; and places that only fill a batch."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import index_of, png, write_tar
from PIL import Image, ImageOps
from running import ROOT
from torchvision.transforms import v2

from dist_trainer.data.augment import CenterCrop
from dist_trainer.data.batch import EvalAddress
from dist_trainer.data.config import DataConfig
from dist_trainer.data.decoder import Decoder
from dist_trainer.data.read import Bad
from dist_trainer.data.samples import EvalSamples

CONFIG = DataConfig(train="", val="")
RNG = np.random.default_rng(0)


def turned(orientation: int, suffix: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (40, 64, 3), dtype=np.uint8)).save(buffer, suffix, exif=exif, quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["JPEG", "PNG"])
def test_an_image_is_turned_as_pillow_turns_it_and_a_box_is_cut_out_of_that(orientation: int, suffix: str) -> None:
    """For every orientation. Mutations: mirror the wrong axis; map the box without turning it."""
    data = turned(orientation, suffix)
    apply, ignore = (Decoder(DataConfig(train="", val="", exif=exif)) for exif in ("apply", "ignore"))
    with Image.open(io.BytesIO(data)) as image:
        expected = torch.from_numpy(np.array(ImageOps.exif_transpose(image))).permute(2, 0, 1)
        stored = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    found = apply(data)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected)
    assert torch.equal(torch.as_tensor(ignore(data)), stored)
    left, top, width, height = 3, 5, 17, 11
    part = apply(data, (left, top, width, height))
    assert torch.equal(torch.as_tensor(part), expected[:, top : top + height, left : left + width])
    rows = np.array([(64, 40)], [("width", "<u2"), ("height", "<u2")])
    widths, heights = apply.sizes([data], rows)
    assert (heights[0], widths[0]) == expected.shape[1:]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(2, 300), (300, 2), (7, 1000), (40, 1400), (1, 200)])
def test_the_centre_of_a_strip_is_that_of_its_resized_whole(height: int, width: int, interpolation: str) -> None:
    """Against torchvision, which resizes all of it, up to one level. Mutations: half a pixel beside; a
    kernel that does not widen where the image gets smaller."""
    image = torch.from_numpy(RNG.integers(0, 256, (3, height, width), dtype=np.uint8))
    mode = v2.InterpolationMode(interpolation)
    expected = v2.CenterCrop(24)(v2.Resize(32, mode, antialias=True)(image))
    found = CenterCrop(32, 24, interpolation)(image)
    assert found.shape == expected.shape == (3, 24, 24)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_a_strip_smaller_than_the_crop_is_padded_as_the_whole_would_be() -> None:
    image = torch.from_numpy(RNG.integers(0, 256, (3, 2, 300), dtype=np.uint8))
    expected = v2.CenterCrop(40)(v2.Resize(32, antialias=True)(image))
    assert (CenterCrop(32, 40)(image).int() - expected.int()).abs().max() <= 1


def test_other_images_are_resized_to_the_bit_as_torchvision_does() -> None:
    """Up to 32 times longer than wide. Fails when runs from before would be scored on other pixels."""
    for height, width in ((40, 50), (10, 320), (300, 200)):
        image = torch.from_numpy(RNG.integers(0, 256, (3, height, width), dtype=np.uint8))
        expected = v2.CenterCrop(24)(v2.Resize(32, antialias=True)(image))
        found = CenterCrop(32, 24)(image)
        assert torch.equal(found, expected)
        assert found.untyped_storage().nbytes() == found.numel()


def test_a_strip_costs_no_more_than_its_crop() -> None:
    """8,000 x 2 pixels at 256 -> 224, whose resized whole has 786 MB. Mutation: resize first."""
    code = (
        "import resource, torch; from dist_trainer.data.augment import CenterCrop; import torchvision.transforms.v2\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "CenterCrop(256, 224)(torch.zeros(3, 2, 8000, dtype=torch.uint8))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 100_000  # KB


def test_places_that_fill_a_batch_are_neither_read_nor_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 images in a batch of 8. Fails when the batch's rest is decoded again."""
    path = write_tar(tmp_path / "0.tar", [m for n in range(3) for m in ((f"{n}.png", png(RNG)), (f"{n}.cls", b"0"))])
    samples = EvalSamples(index_of(path), CONFIG, CenterCrop(None, 6))
    decoded = []
    whole = samples._decode.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, data, box=None: decoded.append(data) or whole(data, box))
    batch = samples[EvalAddress(0, 8)]
    assert sum(isinstance(each, bytes) for each in decoded) == 3
    assert (batch.num_valid, batch.bad, batch.images.shape) == (3, [], (8, 3, 6, 6))
    assert batch.weight.tolist() == [1.0] * 3 + [0.0] * 5


def test_an_image_over_the_limit_is_bad_by_its_size_and_the_key_is_named(tmp_path: Path) -> None:
    """The index takes it, and Pillow's own limit does not come before. Fails when a second limit is met."""
    buffer = io.BytesIO()
    Image.new("RGB", (14_000, 13_000)).save(buffer, "JPEG", quality=20)
    path = write_tar(
        tmp_path / "0.tar", [("0.jpg", buffer.getvalue()), ("0.cls", b"0"), ("1.png", png(RNG)), ("1.cls", b"0")]
    )
    index = index_of(path)
    assert not index.problems
    batch = EvalSamples(index, CONFIG, CenterCrop(None, 6))[EvalAddress(0, 2)]
    (bad,) = batch.bad
    assert (bad.sample, bad.reason) == (0, "14,000 x 13,000 pixels are more than data.max_pixels, 178,956,970")
    none = EvalSamples(index, DataConfig(train="", val="", max_pixels=1), CenterCrop(None, 6))[EvalAddress(0, 2)]
    assert (none.num_valid, len(none.bad)) == (0, 2)  # a batch of which nothing is read
    larger = Decoder(DataConfig(train="", val="", max_pixels=200_000_000))
    assert larger.too_large(14_000, 13_000) is None
    assert isinstance(Decoder(CONFIG).too_large(14_000, 13_000), Bad)
    assert torch.as_tensor(larger(buffer.getvalue(), (0, 0, 8, 8))).shape == (3, 8, 8)
