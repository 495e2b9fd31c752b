"""Things chosen by name in a config: a built-in, or the user's own as `package.module:Name`, with `args`."""

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from dist_trainer.errors import UserError, nearest
from dist_trainer.plan import Duration

MOST_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Named:
    """Something chosen by name."""

    name: str
    """A built-in name, or package.module:Name."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments."""


def resolve(key: str, name: str, builtin: Mapping[str, Any], kind: str) -> Any:
    """The object called `name`. Raises UserError, naming the config key, when there is none."""
    if ":" not in name:
        if name in builtin and callable(builtin[name]):
            return builtin[name]
        there = f"; there are {', '.join(sorted(builtin))}" if 0 < len(builtin) <= MOST_LISTED else ""
        raise UserError(
            f"{key}: {name!r} is not a built-in {kind}{nearest(name, builtin)}{there}; your own is written "
            "package.module:Name"
        )
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # `python -m` does this; a console script does not
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{key}: {name!r}: cannot import {module_name!r} ({error})") from None
    if not hasattr(module, attribute):
        raise UserError(f"{key}: {name!r}: {module_name!r} has no {attribute!r}{nearest(attribute, vars(module))}")
    return getattr(module, attribute)


def check_args(key: str, name: str, target: Any, args: Mapping[str, Any], *given: Any, **more: Any) -> None:
    """Raises UserError when `target(*given, **more, **args)` would not bind, and for text where a number belongs."""
    try:
        signature = inspect.signature(target)
    except ValueError:  # a builtin without a signature
        return
    try:
        signature.bind(*given, **more, **args)
    except TypeError as error:
        accepted = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        accepted = [each for each in accepted[len(given) :] if each not in more]
        for unknown in args.keys() - set(accepted):
            there = f"{nearest(unknown, accepted)}; it accepts {', '.join(accepted)}"
            raise UserError(f"{key}.args.{unknown}: {name} takes no {unknown}{there}") from None
        raise UserError(f"{key}.args: {name}: {error}; it accepts {', '.join(accepted)}") from None
    for argument, value in args.items():
        if argument in signature.parameters and (belongs := _other(signature.parameters[argument], value)):
            raise UserError(f"{key}.args.{argument}: {value!r} is not {belongs}")


def _other(parameter: inspect.Parameter, value: Any) -> str | None:
    """What belongs there, by the parameter's default, if it is certain that `value` does not."""
    default, is_text = parameter.default, isinstance(value, str) and not Duration.is_one(value)
    if isinstance(default, bool):
        return "true or false" if is_text else None
    if isinstance(default, int | float):
        return f"a number, such as {default}" if is_text else None
    if default is None and set(get_args(parameter.annotation)) in ({float, type(None)}, {int, type(None)}):
        return "a number or null" if is_text else None
    if isinstance(default, tuple) and default and all(isinstance(each, int | float) for each in default):
        fixed = get_origin(parameter.annotation) is tuple
        right = isinstance(value, list | tuple) and not any(isinstance(each, str) for each in value)
        if not right or (fixed and len(value) != len(default)):
            return f"a list of {f'{len(default)} ' if fixed else ''}numbers, such as {list(default)}"
    return None


def build(key: str, named: Named, builtin: Mapping[str, Any], *, kind: str) -> Any:
    """`Name(**args)`. Raises UserError for an unknown name and for arguments that it does not take."""
    target = resolve(f"{key}.name", named.name, builtin, kind)
    check_args(key, named.name, target, named.args)
    try:
        return target(**named.args)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {named.name}: {error}") from None
