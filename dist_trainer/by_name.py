"""Things chosen by name in a config: a built-in, or the user's own as `package.module:Name`, with `args`."""

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_trainer.errors import UserError, nearest


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
        raise UserError(
            f"{key}: {name!r} is not a built-in {kind}{nearest(name, builtin)}; your own is written package.module:Name"
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
    """Raises UserError when `target(*given, **more, **args)` would not bind."""
    try:
        signature = inspect.signature(target)
    except ValueError:  # a builtin without a signature
        return
    try:
        signature.bind(*given, **more, **args)
    except TypeError as error:
        accepted = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        raise UserError(f"{key}.args: {name}: {error}; it accepts {', '.join(accepted)}") from None


def build(key: str, named: Named, builtin: Mapping[str, Any], *, kind: str) -> Any:
    """`Name(**args)`. Raises UserError for an unknown name and for arguments that it does not take."""
    target = resolve(f"{key}.name", named.name, builtin, kind)
    check_args(key, named.name, target, named.args)
    try:
        return target(**named.args)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {named.name}: {error}") from None
