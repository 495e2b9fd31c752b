"""Small images, image folders, tars and data sets for the tests."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

from dist_trainer.commands.main import dispatch
from dist_trainer.data.augment import Augment, AugmentConfig
from dist_trainer.data.index import ShardIndex
from dist_trainer.errors import UserError
from dist_trainer.packing.pack import pack
from dist_trainer.packing.sources import FolderSource
from dist_trainer.packing.write import Recipe
from dist_trainer.plan import BatchConfig, Duration, Plan, make_plan
from dist_trainer.shards.join import join
from dist_trainer.shards.scan import scan_tar

hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("no deadline")

Members = list[tuple[str, bytes]]


def png(rng: np.random.Generator, height: int = 8, width: int = 8) -> bytes:
    """A PNG of random RGB pixels."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """uint8 [3, H, W] as Pillow decodes them."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB")).transpose(2, 0, 1)


def pack_images(folder: Path, *, num_samples: int, num_classes: int, per_shard: int) -> Path:
    """Random PNGs in `folder`/images/CLASS, packed with `pack` into `folder`/packed, which is returned."""
    rng = np.random.default_rng(0)
    for number in range(num_samples):
        path = folder / "images" / f"class_{number % num_classes}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(rng, height=10, width=12))
    out = folder / "packed"
    source = FolderSource(folder / "images")
    assert sum(pack(source, out, Recipe(samples_per_shard=per_shard), num_processes=1)) == num_samples
    return out


def write_tar(path: Path, members: Members) -> Path:
    """A tar by Python's tarfile, in the given order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(path: Path) -> dict[str, tarfile.TarInfo]:
    """Python's own view of a tar, by member name."""
    with tarfile.open(path) as tar:
        return {member.name: member for member in tar}


def sample_members(num_samples: int, size: int = 8) -> Members:
    """`num_samples` labelled images, as the members of a tar."""
    rng = np.random.default_rng(1)
    members = []
    for number in range(num_samples):
        members += [(f"{number:03d}.cls", str(number % 3).encode()), (f"{number:03d}.png", png(rng, size, size))]
    return members


def index_of(*tars: Path) -> ShardIndex:
    """Tars of one folder, scanned in this process."""
    index = join([tar.name for tar in tars], [scan_tar(tar) for tar in tars])
    return replace(index, root=str(tars[0].parent))


def message(caught: pytest.ExceptionInfo[UserError]) -> str:
    """The text of a UserError, which must be one line."""
    text = str(caught.value)
    assert text
    assert "\n" not in text, f"more than one line: {text!r}"
    return text


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def augment_of(
    config: AugmentConfig, plan: Plan | None = None, seed: int = 0, mean: Sequence[float] = (0.485, 0.456, 0.406)
) -> Augment:
    """The training transform of `plan`, or of a run of 10 epochs of 10 steps."""
    if plan is None:
        batch = BatchConfig(global_batch=8, micro_batch=4)
        plan = make_plan(batch, Duration(10, "ep"), world=1, num_samples=80)
    return Augment(config, seed, plan, mean)


def labelled(rng: np.random.Generator, first: int, count: int, broken: int | None = None) -> Members:
    """`count` images of 28 x 28 with seven classes, numbered from `first`; the data of one do not decode."""
    members: Members = []
    for number in range(first, first + count):
        image = png(rng, 28, 28)
        if number == broken:
            image = image[:60] + bytes(len(image) - 72) + image[-12:]  # its header and its end are whole
        members += [(f"{number:04d}.png", image), (f"{number:04d}.cls", b"%d" % (number % 7))]
    return members


def refused(*argv: object) -> str:
    """The one line of a command that the user has to mend."""
    with pytest.raises(UserError) as caught:
        dispatch([str(arg) for arg in argv])
    return message(caught)
