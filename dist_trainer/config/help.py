"""What --help prints: the command's own options, then the keys of a config by sections, one line a key."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from dist_trainer.config.suggestions import suggestion
from dist_trainer.config.tree import TrainConfig
from dist_trainer.config.values import groups_in, helps, hints_of, keys_of
from dist_trainer.errors import UserError, first_sentence
from dist_trainer.plan import DurationText

_NAME_WIDTH = 44
REQUIRED = "required"
_METAVARS: dict[Any, str] = {int: "N", float: "X", bool: "true|false", str: "TEXT", NoneType: "null"}


def keys_help() -> Iterator[str]:
    """A section for each group of keys, a line for each key: how it is written, what it does, its default."""
    yield "Keys of CONFIG.yaml, options as well; --help KEY tells all about one:"
    first = [each for each in fields(TrainConfig) if not is_dataclass(hints_of(TrainConfig)[each.name])]
    yield ""
    for each in first:
        yield _line(TrainConfig, each.name, each.name)
    for name, hint in hints_of(TrainConfig).items():
        for group in groups_in(hint):
            yield ""
            yield fitting(f"{name}: {first_sentence((group.__doc__ or '').strip())}")
            yield from _lines(group, f"{name}.")


def _lines(cls: type, prefix: str, *, optional: bool = False) -> Iterator[str]:
    """`optional`: the group may be left out, and its first key with it."""
    for name, hint in hints_of(cls).items():
        groups = groups_in(hint)
        if not groups or get_origin(hint) is list:
            yield _line(cls, name, prefix + name, optional=optional)
            continue
        if name in helps(cls):  # otherwise its keys say enough
            yield _line(cls, name, prefix + name)
        yield from _lines(groups[0], f"{prefix}{name}.", optional=True)


def _line(cls: type, name: str, key: str, *, optional: bool = False) -> str:
    (field,) = (each for each in fields(cls) if each.name == name)
    text = first_sentence(helps(cls).get(name, ""))
    default = _default(field)
    return option_line(
        f"{key} {metavar(hints_of(cls)[name])}", text, "" if optional and default == REQUIRED else default
    )


def option_line(option: str, text: str, default: str = "") -> str:
    return place_line(f"--{option}", f"[{default}] {text}" if default else text)


def place_line(name: str, text: str) -> str:
    return fitting(f"  {name:<{_NAME_WIDTH}} {text}")


def fitting(line: str) -> str:
    """Cut at the width of a terminal; whole in a file or a pipe."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(line)
    return line if len(line) <= width else f"{line[: width - 1]}…"


def metavar(hint: Any) -> str:
    """What a value looks like: N, X, TEXT, one|of|these, [N, ...]."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return "DURATION" if hint is DurationText else metavar(args[0])
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is list:
        return f"[{metavar(args[0])}, ...]"
    if origin is tuple:
        return f"[{', '.join(map(metavar, args))}]"
    if args and origin is not dict:
        return "|".join(map(metavar, args))
    return _METAVARS.get(hint, "{KEY: VALUE}")


def _default(field: Any) -> str:
    if field.default is MISSING:
        if field.default_factory is MISSING:
            return REQUIRED
        value = field.default_factory()
        return f"name: {value.name}" if hasattr(value, "name") else "" if is_dataclass(value) else str(value)
    default = field.default
    if default is None or isinstance(default, bool):
        return "null" if default is None else str(default).lower()
    return str(list(default) if isinstance(default, tuple) else default)


def key_help(key: str) -> str:
    """All about a key, and those below it. Raises UserError for one that does not exist."""
    lines = list(_whole(TrainConfig, "", key))
    if not lines:
        raise UserError(f"--help: {key}: no such key{suggestion(key, list(keys_of(TrainConfig)))}")
    return "\n".join(lines)


def _whole(cls: type, prefix: str, wanted: str) -> Iterator[str]:
    for field in fields(cls):
        key, hint = prefix + field.name, hints_of(cls)[field.name]
        groups = groups_in(hint)
        if key == wanted or key.startswith(f"{wanted}."):
            default = _default(field)
            yield f"--{key} {metavar(hint)}{f'  [{default}]' if default else ''}"
            group_text = first_sentence((groups[0].__doc__ or "").strip()) if groups else ""
            yield f"    {helps(cls).get(field.name) or group_text}"
        for group in groups:
            yield from _whole(group, f"{key}.", wanted)
