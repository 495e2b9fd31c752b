"""Tensors in safetensors files, and the digests of files. No pickle is ever read."""

import hashlib
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dist_trainer.errors import UserError
from dist_trainer.storage.atomic import replacing
from dist_trainer.tensors import State


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def on_host(state: State) -> State:
    """`state` contiguous on the host, copied where it has to be: safetensors takes neither channels_last nor views of
    one storage."""
    whole, seen = {}, set[int]()
    for name, value in state.items():
        storage = value.untyped_storage()
        fits = value.device.type == "cpu" and value.is_contiguous() and storage.nbytes() == value.nbytes
        stays = fits and storage.data_ptr() not in seen
        whole[name] = value.detach() if stays else value.detach().to("cpu", copy=True).contiguous()
        seen.add(storage.data_ptr())
    return whole


def save_tensors(tensors: State, path: Path, *, durable: bool = False) -> None:
    """Write a safetensors file atomically. Raises OSError when the storage refuses."""
    with replacing(path, durable=durable) as temporary:
        try:
            save_file(on_host(tensors), temporary)
        except SafetensorError as error:  # an OSError in disguise
            number = re.search(r"\(os error (\d+)\)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from None


def read_tensors(path: Path) -> State:
    """All tensors of a safetensors file, on the host. Raises UserError for another kind of file."""
    try:
        tensors: State = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None
    return tensors
