"""Whether the values of a config have the types of their keys, and what to write instead."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dist_trainer.config.suggestions import suggestion
from dist_trainer.config.tree import TrainConfig
from dist_trainer.config.yaml_text import load
from dist_trainer.errors import UserError, first_sentence, nearest


def hints_of(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def groups_in(hint: Any) -> list[type]:
    """The dataclasses that a type such as `CropConfig | None` or `list[Named]` may hold."""
    if is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return [found for part in get_args(hint) for found in groups_in(part)]


@cache
def helps(cls: type) -> dict[str, str]:
    """Field -> the string under it, as one line."""
    from docstring_parser import parse_from_object  # only where help or a mistake is printed

    described = parse_from_object(cls).params
    return {each.arg_name: " ".join((each.description or "").split()) for each in described}


def keys_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key of a config, such as batch.global_batch, and those of what is optional."""
    for each in fields(cls):
        yield prefix + each.name
        for inner in groups_in(hints_of(cls)[each.name]):
            yield from keys_of(inner, f"{prefix}{each.name}.")


def words(hint: Any) -> str:
    """What may stand where this type belongs, such as "a number (or null)"."""
    kind, args = _kind(hint)
    return _WORDS[kind](*args)


def fits(hint: Any, value: Any) -> bool:
    """Whether a value, as YAML has it, is of this type; what is inside groups of keys is not looked at."""
    kind, args = _kind(hint)
    return _FITS[kind](value, *args)


def _kind(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """What the tables below know this type by, and its arguments."""
    if is_dataclass(hint):
        return "group", (hint,)
    origin = get_origin(hint)
    return Union if origin is UnionType else origin or hint, get_args(hint)


def _union(*args: Any) -> str:
    null = " (or null)" if NoneType in args else ""
    return " or ".join(words(each) for each in args if each is not NoneType) + null


_WORDS: dict[Any, Callable[..., str]] = {
    int: lambda: "a whole number",
    float: lambda: "a number",
    bool: lambda: "true or false",
    str: lambda: "text",
    Annotated: lambda _, form: str(form.words),
    Union: _union,
    Literal: lambda *args: f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0]),
    list: lambda item: f"a list, each {words(item)}",
    tuple: lambda *items: f"a list of {len(items)}, each {words(items[0])}",
    dict: lambda *_: "a group of keys with values",
    "group": lambda group: f"a group of keys ({', '.join(hints_of(group))})",
}
_FITS: dict[Any, Callable[..., bool]] = {
    int: lambda value: isinstance(value, int) and not isinstance(value, bool),
    float: lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
    bool: lambda value: isinstance(value, bool),
    str: lambda value: isinstance(value, str),
    NoneType: lambda value: value is None,
    Annotated: lambda value, base, form: fits(base, value) and form.fits(value),
    Union: lambda value, *args: any(fits(each, value) for each in args),
    Literal: lambda value, *args: any(value == each and fits(type(each), value) for each in args),
    list: lambda value, item: isinstance(value, list) and all(fits(item, each) for each in value),
    tuple: lambda value, *items: isinstance(value, list) and len(value) == len(items) and all(map(fits, items, value)),
    dict: lambda value, *_: isinstance(value, Mapping) and not any(map(_spaced, value.items())),
    "group": lambda value, _: isinstance(value, Mapping),
}


class Typed(str):
    """A value as it stands on the command line, where what looks like a number may be text."""

    @property
    def value(self) -> Any:
        """As YAML has it."""
        try:
            return load(self)
        except UserError:
            return str(self)


def check_value(cls: type, name: str, key: str, value: Any) -> None:
    """Raises UserError if `value` cannot be that of the field `name`, called `key` in full."""
    hint = hints_of(cls)[name]
    if fits(hint, value) or (isinstance(value, Typed) and fits(hint, value.value)):
        return
    typed, value = value, value.value if isinstance(value, Typed) else value
    on_command_line = isinstance(typed, Typed)
    shown = str(typed) if on_command_line and not isinstance(value, str) else _as_written(value)
    (field,) = (each for each in fields(cls) if each.name == name)
    instead = _instead(hint, key, value, on_command_line) or _example(field, hint)
    line = f"{key}: {shown} is not {words(hint)}{instead}"
    explained = first_sentence(helps(cls).get(name, ""))
    raise UserError(f"{line}{'' if line.endswith('?') else '.'} {explained}" if explained else line)


def _as_written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value)


def _instead(hint: Any, key: str, value: Any, on_command_line: bool) -> str:
    """How this very value is written, if it can be meant."""
    groups = groups_in(hint) if get_origin(hint) is not list else []
    for first, inner in ((name, each) for group in groups for name, each in list(hints_of(group).items())[:1]):
        if value is not None and fits(inner, value):
            return f"; write --{key}.{first} {value}" if on_command_line else f"; write {{{first}: {value}}}"
    if get_origin(hint) is list and fits(hint, [value]):
        return f"; write [{value}]"
    if isinstance(value, int | float) and fits(hint, str(value)):
        return f"; as text it is written '{value}', in quotes"
    if isinstance(value, Mapping) and any(map(_spaced, value.items())):
        return "; after a colon belongs a blank: {KEY: VALUE}"
    if isinstance(value, str):
        return nearest(value, _choices(hint))
    return ""


def _spaced(item: tuple[Any, Any]) -> str:
    """`{a:3}` is a key of that name to YAML, without a value; this is what was meant, or else ""."""
    name, sign, rest = str(item[0]).partition(":")
    return f"{name}: {rest}" if sign and rest and item[1] is None else ""


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return list(map(str, get_args(hint)))
    return [choice for part in get_args(hint) if get_origin(hint) is not Annotated for choice in _choices(part)]


def _example(field: Field[Any], hint: Any) -> str:
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    shown = default is not MISSING and (hint in (int, float) or get_origin(hint) is tuple)
    return f", such as {default}" if shown else ""


def check_values(
    values: Mapping[str, Any], cls: type = TrainConfig, prefix: str = "", *, only_keys: bool = False
) -> None:
    """Every key exists, and every value has its type. Raises UserError for the first that is wrong.

    The parser would accept some misspelt keys (`agrs: {}`) and null for any, and names others without their parent.
    """
    hints = hints_of(cls)
    for key, value in values.items():
        if not isinstance(key, str):
            raise UserError(f"{prefix}{key}: a key must be a word")
        if "." in key:
            nested = key.replace(".", ": {") + ": VALUE" + "}" * key.count(".")
            raise UserError(f"{prefix}{key}: in a file, keys stand within each other: {nested}")
        if key not in hints:
            if spaced := _spaced((key, value)):
                raise UserError(f"{prefix}{key}: after a colon belongs a blank: {{{spaced}}}")
            name, inside = prefix + key, value
            while isinstance(inside, Mapping) and len(inside) == 1:  # --btch.global_batch is meant as a whole
                ((inner_key, inside),) = inside.items()
                name += f".{inner_key}"
            raise UserError(f"{name}: no such key{suggestion(name, list(keys_of(cls, prefix)))}")
        if not only_keys:
            check_value(cls, key, prefix + key, value)
        groups = groups_in(hints[key])
        inside = value.value if groups and isinstance(value, Typed) else value
        for inner in groups:
            for item in inside if isinstance(inside, list) else [inside]:
                if isinstance(item, Mapping):
                    check_values(item, inner, f"{prefix}{key}.", only_keys=only_keys)
