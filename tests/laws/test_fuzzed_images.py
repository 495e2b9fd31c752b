"""A thousand broken images of ten formats: each is used, bad or refused by name, and the process lives."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from running import ROOT

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
SUFFIXES = {"JPEG": "jpg", "JPEG2000": "jp2", "TGA": "png"}  # TGA: a format that is not known, under another's suffix
COUNT = 1000


def spoilt(rng: np.random.Generator, data: bytes) -> bytes:
    """Bits flipped, cut short, filled up, or an extreme shape in place of the image."""
    kind = rng.integers(0, 4)
    if kind == 0:
        return data[: rng.integers(0, len(data))]
    if kind == 1:
        return data + rng.bytes(int(rng.integers(1, 100)))
    changed = bytearray(data)
    first = kind == 2  # in the header
    for _ in range(int(rng.integers(1, 6))):
        changed[int(rng.integers(0, min(len(data), 64) if first else len(data)))] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def make(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(COUNT):
        name = FORMATS[number % len(FORMATS)]
        height, width = (1, 3000) if number % 50 == 7 else rng.integers(1, 80, 2).tolist()
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        try:
            image.save(buffer, name)
        except (OSError, KeyError):  # this Pillow does not write it
            image.save(buffer, "PNG")
        suffix = SUFFIXES.get(name, name.lower())
        if number % 13 == 0:
            suffix = "jpg"  # a wrong one
        (folder / f"{number:04d}.{suffix}").write_bytes(
            spoilt(rng, buffer.getvalue()) if number % 10 != 5 else buffer.getvalue()
        )


READ = """
import json, resource, sys, warnings
import numpy as np, torch, torchvision.io
from pathlib import Path
warnings.simplefilter("ignore")
from dist_trainer.data.augment import CenterCrop
from dist_trainer.data.batch import EvalAddress
from dist_trainer.data.config import DataConfig
from dist_trainer.data.samples import EvalSamples
from dist_trainer.shards.image_folder import scan_folder
from dist_trainer.shards.join import join
config = DataConfig(train="", val="")
CenterCrop(64, 56)(torch.zeros(3, 70, 80, dtype=torch.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scan = scan_folder(sys.argv[1])
index = join(["class"], [scan], root=str(Path(sys.argv[1]).parent), allow_bad=len(scan.samples))
samples = EvalSamples(index, config, CenterCrop(64, 56))
bad, good = [], 0
for number in range(len(index) // 20):
    batch = samples[EvalAddress(number, 20)]
    assert batch.problem is None, batch.problem
    bad += [[each.shard, each.reason] for each in batch.bad]
    good += batch.num_valid
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"good": good, "bad": bad, "refused": [str(each) for each in scan.problems], "grown": grown}))
"""


def test_each_is_used_bad_or_refused_by_name(tmp_path: Path) -> None:
    """Nothing takes 300 MB; no decoder ends the process. Mutations: PNG goes to torchvision's decoder; a sample that
    does not decode is passed over.
    """
    make(tmp_path / "class")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "class")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["good"] + len(found["bad"]) == COUNT
    known_at_once = {line.split(": ")[2] for line in found["refused"]}
    named = {Path(shard).name for shard, _ in found["bad"]}
    assert known_at_once <= named
    assert found["good"] > COUNT // 4
    assert len(found["refused"]) > COUNT // 10
    assert found["grown"] < 300_000, f"{found['grown']:,} KB"
