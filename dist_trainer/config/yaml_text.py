"""YAML as configs are written: numbers such as 1e-3 are numbers, and no key stands twice."""

import re
from typing import Any

import yaml

from dist_trainer.errors import UserError

MERGE = "tag:yaml.org,2002:merge"
FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """PyYAML alone takes 1e-3 for text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def load(text: str) -> Any:
    """The value of a YAML document. Raises UserError, in one line."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, "")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}") from None


def _check(node: yaml.Node, prefix: str) -> None:
    """PyYAML drops the first of two equal keys. One that a merge key (<<) brings as well is meant to be replaced."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, prefix)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if key.tag != MERGE and name in lines:
                where = f"in lines {lines[name]} and {line}" if line != lines[name] else f"in line {line}"
                raise UserError(f"{prefix}{name}: stands twice, {where}; the first would be lost, keep one")
            lines[name] = line
            _check(value, f"{prefix}{name}.")
