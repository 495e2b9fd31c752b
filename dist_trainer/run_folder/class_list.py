"""classes.json: the class names of a run, in the order of its network's outputs; found from any of its weights."""

import json
from collections.abc import Sequence
from pathlib import Path

from dist_trainer.storage.atomic import replace_text
from dist_trainer.storage.storage import Storage, is_remote

_NAME = "classes.json"
_LEVELS = 4
"""A run folder, or what lies as deep in one as checkpoints/step_00000010/model.safetensors."""


def write(run: Path, names: Sequence[str]) -> None:
    replace_text(run / _NAME, json.dumps(list(names), ensure_ascii=False, indent=0) + "\n")


def beside(weights: str, storage: Storage) -> tuple[str, tuple[str, ...]] | None:
    """(the list's place, the names) of the run folder that `weights`, a path or a URL, is or lies in.

    None for weights elsewhere, and for those of a run from before such lists.
    """
    folder = weights.rstrip("/") if is_remote(weights) else str(Path(weights).absolute())
    for _ in range(_LEVELS):
        try:
            storage.stat(f"{folder}/identity.json")
            return f"{folder}/{_NAME}", read_names(storage.read(f"{folder}/{_NAME}"))
        except (OSError, ValueError):
            folder = folder.rpartition("/")[0]
            if not folder or folder.endswith(("/", ":")):
                return None
    return None


def read_names(content: bytes) -> tuple[str, ...]:
    """The names in a JSON list. Raises ValueError for anything else."""
    try:
        names = json.loads(content)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError('not a list of class names, such as ["ant", "bee"]')
    return tuple(names)
