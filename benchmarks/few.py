"""A few images for --smoke: made once, in data/smoke, from what `make data` prepares and from nothing."""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from machine import DATA
from PIL import Image

from dist_trainer.data.config import DataConfig
from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.data.read import Reader

FOLDER = DATA / "smoke"


def few_photographs() -> Path:
    """128 noisy JPEGs of 500x375 pixels in two classes, laid out as photographs.py does."""
    folder = FOLDER / "photographs"
    if folder.is_dir():
        return folder
    partial = folder.with_name(".photographs.partial")
    shutil.rmtree(partial, ignore_errors=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", 128), ("val", 16)):
        for number in range(count):
            path = partial / split / f"class{number % 2}" / f"{number:04d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((500, 375)).save(path, quality=90)
    pack = [sys.executable, "-m", "dist_trainer", "shards", "pack", str(partial), str(partial / "packed")]
    subprocess.run([*pack, "--samples_per_shard", "32"], check=True, stdout=subprocess.DEVNULL)
    partial.replace(folder)
    return folder


def few_fashion() -> Path:
    """A folder with one tar of 512 validation images of Fashion-MNIST, indexed."""
    folder = FOLDER / "fashion_mnist"
    if folder.is_dir():
        return folder
    partial = folder.with_name(".fashion_mnist.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    index, config = ShardIndex.load(DATA / "fashion_mnist/val" / FILE_NAME), DataConfig(train="", val="")
    ids = np.arange(512)
    images = Reader(index, retry=config.retry, cache=config.cache).read(ids)
    with tarfile.open(partial / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample, image in zip(ids.tolist(), images, strict=True):
            assert isinstance(image, bytes)
            for suffix, data in (("png", image), ("cls", b"%d" % index.samples["label"][sample])):
                info = tarfile.TarInfo(f"{sample:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (partial / "classes.txt").write_text("".join(f"{name}\n" for name in index.class_names))
    subprocess.run(
        [sys.executable, "-m", "dist_trainer", "shards", "index", str(partial)], check=True, stdout=subprocess.DEVNULL
    )
    partial.replace(folder)
    return folder
