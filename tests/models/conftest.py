"""A process group of one, no network, photographs."""

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch.distributed as dist
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.distributed import HashStore


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cache but an empty one, and no network: HTTPS goes to a port where nothing listens."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve JPEGs of 400 x 427: pieces of scikit-learn's two photographs, their colours exchanged in every way."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, pixels in enumerate(load_sample_images().images):
        for left, colours in zip(range(0, 240, 40), permutations(range(3)), strict=True):
            piece = Image.fromarray(pixels[:, left : left + 400, colours])
            piece.save(folder / f"{number}_{left:03d}.jpg", quality=95)
    return sorted(folder.iterdir())
