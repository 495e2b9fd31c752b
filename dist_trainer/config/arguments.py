"""Command-line arguments and config files to a config; one formatter for everything that is wrong in them."""

import ast
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from dist_trainer.config.keys import check_keys
from dist_trainer.config.preprocess import resolve_preprocess
from dist_trainer.config.tree import TrainConfig
from dist_trainer.errors import UserError, nearest
from dist_trainer.run_folder.fetch import Part, local_run
from dist_trainer.storage.storage import is_remote

Parser = ArgumentParser
"""For the type of what `new_parser` gives."""


def new_parser(command: str, description: str, config: bool = True) -> Parser:
    """A parser of `dist-trainer COMMAND`, with every key of a config as an option unless `config` is false."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the string under a field is its help
    parser = ArgumentParser(
        prog=f"dist-trainer {command}", description=description, exit_on_error=False, allow_abbrev=False
    )
    if config:
        parser.add_argument("--config", action="config", help="YAML file; several merge left to right")
        parser.add_class_arguments(TrainConfig, nested_key=None, sub_configs=False)
    return parser


def parse(parser: Parser, argv: list[str]) -> Namespace:
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(_one_line(str(error), [action.dest for action in parser._actions])) from None


def _one_line(text: str, known: list[str]) -> str:
    """jsonargparse's message as one line that names key, value and what is allowed."""
    line = " ".join(text.split())
    if match := re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", line):
        return f"--{match[1]}: no such key{nearest(match[1], known)}"
    if match := re.search(r"arguments are required: ([^\s,]+)", line):
        return f"{match[1]}: is required"
    if match := re.fullmatch(r'Parser key "([^"]+)":\s*(.*)', line):
        key, reason = match[1], match[2]
        reason = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", reason).replace("typing.", "")
        if key == "config":
            return reason
        return f"{key}: {reason}"
    return line


def _check_keys(argv: list[str], options: set[str]) -> None:
    """Every key of every --config file and of every --key.sub argument exists."""
    words = iter(argv)
    for word in words:
        if word == "--":
            return
        if not word.startswith("--"):
            continue
        name, _, value = word[2:].partition("=")
        if name == "config":
            _check_file(value or next(words, ""))
        elif name.partition(".")[0] not in options:
            _check_argument(name.removesuffix("+"), value or next(words, ""))


def _check_argument(name: str, text: str) -> None:
    try:
        nested: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        nested = text
    for part in reversed(name.split(".")):
        nested = {part: nested}
    check_keys(nested)


def _check_file(file: str) -> None:
    try:
        values = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a config: it holds {type(values).__name__} where keys belong")
    try:
        check_keys(values)
    except UserError as error:
        raise UserError(f"{error} (in {file})") from None


def _with_config(argv: list[str]) -> list[str]:
    """A positional CONFIG becomes --config: jsonargparse's positional config action is broken."""
    if argv and not argv[0].startswith("-"):
        if not Path(argv[0]).is_file():
            raise UserError(f"{argv[0]}: no such config file; dist-trainer ls shows those that are shipped")
        return ["--config", *argv]
    return argv


def value_of(argv: list[str], name: str) -> str | None:
    """The value of --name, if it is given."""
    words = iter(argv)
    for word in words:
        key, sign, value = word.partition("=")
        if key == f"--{name}":
            return value if sign else next(words, "")
    return None


def run_folder_argument(argv: list[str], *parts: Part) -> tuple[Path | None, list[str]]:
    """(the run folder that is given instead of a config, if one is; the arguments with its config.yaml).

    Of a run at a URL these parts are copied. Raises UserError for a folder that is no run folder.
    """
    given = argv[0] if argv and not argv[0].startswith("-") else ""
    if not is_remote(given) and not (given and Path(given).is_dir()):
        return None, argv
    folder = local_run(given, parts)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder: it has no config.yaml")
    return folder, [str(folder / "config.yaml"), *argv[1:]]


def stem(values: Namespace) -> str:
    """How names of run folders begin: the config file's name without its ending."""
    return Path(str(values.config[0])).stem if values.get("config") else "run"


def _with_null(argv: list[str]) -> list[str]:
    """Python's None is YAML's null, in nested values too: `wandb agent` writes what it found as Python does."""
    words, before = [], ""
    for word in argv:
        name, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(f"{name}{sign}{_null(value)}" if sign or before.startswith("--") else word)
        before = "" if sign else word
    return words


def _null(value: str) -> str:
    if value == "None":
        return "null"
    if value.startswith(("{", "[")) and "None" in value:
        with contextlib.suppress(ValueError, SyntaxError):
            return json.dumps(ast.literal_eval(value))
    return value


def parse_config(parser: Parser, argv: list[str]) -> tuple[TrainConfig, Namespace]:
    """(the config, all values). Raises UserError for keys and values that cannot be."""
    argv = _with_null(_with_config(argv))
    _check_keys(argv, {action.dest for action in parser._actions} - set(TrainConfig.__dataclass_fields__))
    values = parse(parser, argv)
    built = parser.instantiate_classes(values)
    names = TrainConfig.__dataclass_fields__
    return resolve_preprocess(TrainConfig(**{name: built[name] for name in names})), values
