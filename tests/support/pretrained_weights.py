"""Weights to begin with: made, put into the libraries' caches, loaded."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import message
from running import Session
from safetensors.torch import save_file
from torch import nn

from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.models import ModelConfig, build_model
from dist_trainer.models.pretrained import LoadReport, load_pretrained
from dist_trainer.storage.storage import Storage
from dist_trainer.tensors import State

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def trained(name: str, classes: int = 1000, **args: Any) -> nn.Module:
    """A model whose every weight and statistic is random, and not what `build_model` draws."""
    model = build_model(ModelConfig(name=name, args=args), classes, seed=77)
    generator = torch.Generator().manual_seed(5)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator))
    return model


def begin(
    place: object, name: str, classes: int = 7, storage: Storage | None = None, **args: Any
) -> tuple[State, LoadReport]:
    """(state, report) of a fresh model that begins with what is at `place`."""
    config = ModelConfig(name=name, args=args, pretrained=place if place is True else str(place))
    model = build_model(config, classes, seed=0)
    loaded = load_pretrained(config, storage or Storage(), model, ALONE)
    return model.state_dict(), loaded


def refused(call: Callable[..., object], *args: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **more)
    return message(caught)


def in_torch_cache(weights: Any, state: State, home: Path) -> None:
    """Where torch.hub would have put what it downloads."""
    folder = home / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / weights.url.rpartition("/")[2])


def in_hub_cache(repository: str, state: State, home: Path) -> None:
    """Where huggingface_hub would have put it."""
    folder = home / "hf" / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(state, folder / "snapshots" / "abc" / "model.safetensors")


def said_by(program: str, folder: Path, **environment: str) -> str:
    """What a Python program, which may `run` commands of ours, prints."""
    folder.mkdir(exist_ok=True)
    start = "import pathlib, shutil; from dist_trainer.commands.main import dispatch as run; "
    session = Session([sys.executable, "-c", start + program], folder / "log", **environment)
    assert session.wait() == 0, session.log.read_text()
    return session.log.read_text()
