"""Command-line arguments and config files to a config; one formatter for everything that is wrong in them."""

import ast
import contextlib
import json
import re
import sys
from argparse import SUPPRESS
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from dist_trainer.config.help import key_help, keys_help, metavar, option_line, place_line
from dist_trainer.config.preprocess import resolve_preprocess
from dist_trainer.config.tree import TrainConfig
from dist_trainer.config.values import Typed, check_values, words
from dist_trainer.config.yaml_text import load
from dist_trainer.errors import UserError, nearest
from dist_trainer.run_folder.fetch import Part, local_run
from dist_trainer.storage.storage import is_remote

NOT_OWN = {*TrainConfig.__dataclass_fields__, "config", "help"}
"""Options that are no command's own."""


class Parser(ArgumentParser):
    """jsonargparse's, with help of our own."""

    takes_config = False

    def format_help(self, *_: Any, **__: Any) -> str:
        own = [each for each in self._actions if each.dest.partition(".")[0] not in NOT_OWN and each.help != SUPPRESS]
        options, places = ([each for each in own if bool(each.option_strings) is named] for named in (True, False))
        words = ["CONFIG.yaml", "[--key.sub value ...]"] if self.takes_config else []
        words += [each.dest.upper() + ("..." if each.nargs in ("+", "*") else "") for each in places]
        lines = [" ".join(["usage:", self.prog, *words, *(["[options]"] if options else [])]), ""]
        lines += [self.description or "", ""]
        lines += [place_line(each.dest.upper(), each.help or "") for each in places]
        for each in options:
            hint = getattr(each, "_typehint", None) or each.type
            shown = f" {metavar(hint).removesuffix('|null')}" if each.nargs != 0 and hint is not None else ""
            text = "Print the whole config, and end" if each.dest == "print_config" else each.help or ""
            default = "" if each.default in (None, False, SUPPRESS) or each.nargs == 0 else str(each.default)
            lines.append(option_line(each.option_strings[-1].removeprefix("--") + shown, text, default))
        if self.takes_config:
            lines += [option_line("config MORE.yaml", "Another config file; several merge left to right"), ""]
            lines += keys_help()
        return "\n".join(lines).rstrip() + "\n"


def new_parser(command: str, description: str, config: bool = True) -> Parser:
    """A parser of `dist-trainer COMMAND`, with every key of a config as an option unless `config` is false."""
    parser = Parser(prog=f"dist-trainer {command}", description=description, exit_on_error=False, allow_abbrev=False)
    parser.takes_config = config
    if config:
        parser.add_argument("--config", action="config", help="YAML file; several merge left to right")
        parser.add_class_arguments(TrainConfig, nested_key=None, sub_configs=False)
    return parser


def parse(parser: Parser, argv: list[str]) -> Namespace:
    if "--help" in argv and parser.takes_config and (after := argv[argv.index("--help") + 1 :]):
        print(key_help(after[0].removeprefix("--")))
        sys.exit(0)
    try:
        if "--print_config" in argv and parser.takes_config:
            values = parser.parse_args([word for word in argv if word != "--print_config"])
            own = {
                action.dest.partition(".")[0] for action in parser._actions
            } - TrainConfig.__dataclass_fields__.keys()
            for option in own:
                values.pop(option, None)  # the command's, not the config's
            print(parser.dump(values, skip_none=False), end="")
            sys.exit(0)
        return parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(_one_line(str(error), parser)) from None


def _one_line(text: str, parser: Parser) -> str:
    """jsonargparse's message as one line that names the option, the value and what is allowed."""
    line, options = " ".join(text.split()), {action.dest: action for action in parser._actions}
    if match := re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", line):
        return f"--{match[1]}: no such option{nearest(match[1], options)}"
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", line):
        return f"{match[1]}: not understood; after CONFIG.yaml, keys are written --key.sub value"
    if match := re.search(r'(?:Parser key "([^"]+)": .*)?arguments are required: ([^\s,]+)', line):
        key = ".".join(filter(None, match.groups()))
        return f"{key}: is required: in CONFIG.yaml, or --{key} {match[2].rpartition('.')[2].upper()}"
    if match := re.search(r"argument (--\S+): expected one argument", line):
        return f"{match[1]}: its value is missing"
    if match := re.fullmatch(r'Parser key "([^"]+)": .*(?:Got|Given) value: (.*)', line):
        allowed = words(getattr(options[match[1]], "_typehint", str))
        explained = f"; {described}" if (described := options[match[1]].help) else ""
        return f"--{match[1]}: {match[2]!r} is not {allowed}{explained}"
    return line


def _check_keys(argv: list[str], options: set[str]) -> None:
    """Every key of every --config file and of every --key.sub argument exists, and its value has the key's type."""
    for name, value in _pairs(argv):
        if name == "config":
            _check_file(value or "")
        elif name.partition(".")[0] not in options:
            _check_argument(name.removesuffix("+"), value, more=name.endswith("+"))


def _pairs(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """(name, value) of each option; None where no value follows."""
    following = iter(argv)
    for word in following:
        if word == "--":
            return
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            yield name, value if sign else next(following, None)


def _check_argument(name: str, text: str | None, more: bool) -> None:
    """`more`: an item of a list, which --key+ adds."""
    nested: Any = Typed(text or "")
    for part in reversed(name.split(".")):
        nested = {part: nested}
    check_values(nested, only_keys=more or text is None)
    if text is None:
        raise UserError(f"--{name}: its value is missing")


def _check_file(file: str) -> None:
    try:
        text = Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or f'not text: {error}'}") from None
    try:
        values = load(text)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a config: keys belong there, such as data: {{train: FOLDER, val: FOLDER}}")
    try:
        check_values(values)
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
    """(the run folder that is given instead of a config, or around what is given; the arguments with its config.yaml).

    Of a run at a URL these parts are copied. Raises UserError for a folder that is in no run folder, and for nothing.
    """
    given = argv[0] if argv and not argv[0].startswith("-") else ""
    if not is_remote(given) and not (given and Path(given).is_dir()):
        if given and not Path(given).exists():
            raise UserError(f"{given}: no such run folder or config file; dist-trainer runs shows the runs of runs/")
        return None, argv
    folder = local_run(given, parts)
    around = [each for each in list(folder.absolute().parents)[:2] if (each / "identity.json").is_file()]  # RUN/best
    if not (folder / "config.yaml").is_file() and not around:
        raise UserError(f"{folder}: not a run folder: it has no config.yaml")
    folder = folder if (folder / "config.yaml").is_file() else around[0]
    return folder, [str(folder / "config.yaml"), *argv[1:]]


def stem(values: Namespace) -> str:
    """How names of run folders begin: the config file's name without its ending."""
    return Path(str(values.config[0])).stem if values.get("config") else "run"


def _as_yaml(argv: list[str]) -> list[str]:
    """Python's None is YAML's null, in nested values too: `wandb agent` writes what it found as Python does. A negative
    number is no option: argparse takes -1e-4 for one.
    """
    given: list[str] = []
    for word in argv:
        follows = bool(given) and given[-1].startswith("--") and "=" not in given[-1]
        name, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if follows and word.startswith("-") and isinstance(_number(word), int | float):
            given[-1] += f"={word}"
        else:
            given.append(f"{name}{sign}{_null(value)}" if sign or follows else word)
    return given


def _number(word: str) -> Any:
    with contextlib.suppress(UserError):
        return load(word)


def _null(value: str) -> str:
    if value == "None":
        return "null"
    if value.startswith(("{", "[")) and "None" in value:
        with contextlib.suppress(ValueError, SyntaxError):
            return json.dumps(ast.literal_eval(value))
    return value


def parse_config(parser: Parser, argv: list[str]) -> tuple[TrainConfig, Namespace]:
    """(the config, all values). Raises UserError for keys and values that cannot be."""
    argv = _as_yaml(_with_config(argv))
    _check_keys(argv, {action.dest for action in parser._actions} - set(TrainConfig.__dataclass_fields__))
    values = parse(parser, argv)
    built = parser.instantiate_classes(values)
    config = TrainConfig(**{name: built[name] for name in TrainConfig.__dataclass_fields__})
    config.data.check()
    return resolve_preprocess(config), values
