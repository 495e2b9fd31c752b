"""Real JPEGs of ImageNet's size to measure loading with: made once, in data/photographs.

    python benchmarks/photographs.py

1,300 training and 260 validation images of 500x375 pixels and about 104 kB in 13 classes: crops of the photographs in
Debian's packages mate-backgrounds and lomiri-wallpapers-20.04, one class per photograph. These are smoother than
ImageNet's images, so luminance noise and quality 95 bring them to ImageNet's bytes per pixel. Deterministic. Then
packed by `dist-trainer shards pack` into data/photographs/packed, tars and index.
"""

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from few import few_photographs
from machine import DATA, SMOKE
from PIL import Image

PACKAGES = ("mate-backgrounds", "lomiri-wallpapers-20.04")
PHOTOGRAPHS = ("mate/nature/*.jpg", "Kleiber_by_Lukas_Baubkus.jpg")
SPLITS = {"train": 100, "val": 20}  # images per class
WIDTH, HEIGHT, QUALITY, NOISE = 500, 375, 95, 9.4


def photographs() -> Path:
    """The folder with train/CLASS/*.JPEG, val/CLASS/*.JPEG and packed/{train,val}; made where it does not exist."""
    if SMOKE:
        return few_photographs()
    folder = DATA / "photographs"
    if folder.is_dir():
        return folder
    partial = folder.with_name(".photographs.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        backgrounds = _download(Path(temporary))
        sources = sorted(path for pattern in PHOTOGRAPHS for path in backgrounds.glob(pattern))
        with ProcessPoolExecutor(2) as pool:
            list(pool.map(_crops, range(len(sources)), sources, [partial] * len(sources)))
    pack = [sys.executable, "-m", "dist_trainer", "shards", "pack", str(partial), str(partial / "packed")]
    subprocess.run([*pack, "--samples_per_shard", "100"], check=True)
    partial.replace(folder)
    return folder


def _download(folder: Path) -> Path:
    try:
        subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=folder, check=True)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, folder], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmarks/photographs.py needs Debian's packages {' and '.join(PACKAGES)}: {error}")
    return folder / "usr/share/backgrounds"


def _crops(label: int, source: Path, out: Path) -> None:
    """Crops of one photograph: 4:3, at random places, from 500 pixels wide to all that there is."""
    with Image.open(source) as image:
        photograph = image.convert("RGB")
    widest = min(photograph.width, photograph.height * WIDTH // HEIGHT)
    for split, count in SPLITS.items():
        folder = out / split / source.stem.split("_")[0].lower()
        folder.mkdir(parents=True)
        for number in range(count):
            generator = np.random.Generator(np.random.PCG64([label, number, split == "val"]))
            width = int(WIDTH * (widest / WIDTH) ** generator.random())
            height = width * HEIGHT // WIDTH
            left = int(generator.integers(photograph.width - width + 1))
            top = int(generator.integers(photograph.height - height + 1))
            box = (left, top, left + width, top + height)
            crop = photograph.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box)
            noise = generator.normal(0.0, NOISE, (HEIGHT, WIDTH, 1))
            pixels = np.clip(np.rint(np.asarray(crop) + noise), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:04d}.JPEG", quality=QUALITY)


if __name__ == "__main__":
    made = photographs()
    files = list(made.glob("*/*/*.JPEG"))
    print(f"{made}: {len(files)} images, {sum(file.stat().st_size for file in files) / len(files) / 1e3:.1f} kB each")
