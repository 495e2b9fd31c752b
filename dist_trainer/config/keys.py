"""Whether the keys of a config exist."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from dist_trainer.config.tree import TrainConfig
from dist_trainer.errors import UserError, nearest


def _dataclasses_in(hint: Any) -> list[type]:
    """The dataclasses that a type such as `CropConfig | None` or `list[Named]` may hold."""
    if is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return [found for part in get_args(hint) for found in _dataclasses_in(part)]


def keys_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key of a config, such as batch.global_batch, and those of what is optional."""
    hints = get_type_hints(cls)
    for each in fields(cls):
        yield prefix + each.name
        for inner in _dataclasses_in(hints[each.name]):
            yield from keys_of(inner, f"{prefix}{each.name}.")


def check_keys(values: Mapping[str, Any], cls: type = TrainConfig, prefix: str = "") -> None:
    """Raises UserError for the first key that does not exist, with the nearest that does.

    The parser would accept some misspelt keys (`agrs: {}`) and report others without their parent.
    """
    hints = get_type_hints(cls)
    for key, value in values.items():
        if not isinstance(key, str):
            raise UserError(f"{prefix}{key}: a key must be a word")
        if key not in hints:
            name, inside = prefix + key, value
            while isinstance(inside, Mapping) and len(inside) == 1:  # --btch.global_batch is meant as a whole
                ((inner_key, inside),) = inside.items()
                name += f".{inner_key}"
            raise UserError(f"{name}: no such key{nearest(name, keys_of(cls, prefix))}")
        for inner in _dataclasses_in(hints[key]):
            if hints[key] is inner and not isinstance(value, Mapping):
                raise UserError(f"{prefix}{key}: {value!r} where keys belong: {', '.join(get_type_hints(inner))}")
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Mapping):
                    check_keys(item, inner, f"{prefix}{key}.")
