"""The source of a sample's label: its `.cls`, a field of its `.json`, or its key."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from dist_trainer.errors import UserError

MAX_LABEL = 2**20 - 1  # a larger number is a mistake: every class up to it would get a name
_FORMS = "cls, json:KEY (such as json:label or json:meta.label) or key"


@dataclass(frozen=True)
class LabelRule:
    """How labels are read; `text` is the user's notation."""

    kind: Literal["cls", "json", "key"] = "cls"
    fields: tuple[str, ...] = ()
    """For `json`: the path to the field."""

    @classmethod
    def parse(cls, text: str) -> "LabelRule":
        """Raises UserError for an unknown rule."""
        kind, _, field = text.partition(":")
        fields = tuple(field.split("."))
        if kind == "json" and all(fields):
            return cls("json", fields)
        if text not in ("cls", "key"):
            raise UserError(f"--label: {text!r}; write {_FORMS}")
        return cls("cls" if text == "cls" else "key")

    @property
    def text(self) -> str:
        return ":".join(filter(None, (self.kind, ".".join(self.fields))))

    def read(self, key: str, data: bytes) -> int | str:
        """A class number, or a class name. `data` are the bytes of its member with the suffix `kind`.

        Raises ValueError with a text that completes "the label of sample ...".
        """
        if self.kind == "key":
            return _from_key(key)
        return _number(data) if self.kind == "cls" else self._from_json(data)

    def _from_json(self, data: bytes) -> int | str:
        try:
            value: Any = json.loads(data)
        except ValueError:
            raise ValueError("is missing: its .json does not parse") from None
        for name in self.fields:
            if not isinstance(value, dict) or name not in value:
                raise ValueError(f"is missing: its .json has no {'.'.join(self.fields)!r}")
            value = value[name]
        if isinstance(value, str) and value:
            return value
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LABEL:
            return value
        raise ValueError(f"is {value!r}, neither a class number nor a class name")


def _number(data: bytes) -> int:
    text = data[:100].decode("ascii", "replace").strip()
    if not text.isdecimal() or int(text) > MAX_LABEL:
        raise ValueError(f"is {text!r}, not a class number")
    return int(text)


def _from_key(key: str) -> str:
    """The key's folder, or the part of its name before the first underscore: n01440764/10026, n01440764_10026."""
    path, _, base = key.rpartition("/")
    folder = path.rpartition("/")[2]
    if folder not in ("", "."):
        return folder
    name, underscore, _ = base.partition("_")
    if not name or not underscore:
        raise ValueError("is not in its key, which has neither a folder nor an underscore")
    return name
