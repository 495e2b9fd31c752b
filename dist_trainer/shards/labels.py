"""The source of a sample's label: its `.cls`, a field of its `.json`, or its key."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from dist_trainer.data.listing import IMAGE_SUFFIXES, SUFFIXES_TEXT, suffix_of
from dist_trainer.errors import UserError

MAX_LABEL = 2**20 - 1  # a larger number is a mistake: every class up to it would get a name
_MAX_NAME = 256  # bytes of a .cls
_OBVIOUS = (
    "label",
    "class",
    "cls",
    "target",
    "class_id",
    "label_id",
    "class_name",
    "category",
    "category_id",
    "synset",
)
_FORMS = "cls, json:KEY (such as json:label or json:meta.label) or key"


@dataclass(frozen=True)
class LabelRule:
    """How labels are read; `text` is the user's notation."""

    kind: Literal["cls", "json", "key"] = "cls"
    fields: tuple[str, ...] = ()
    """For `json`: the path to the field."""
    image: str = ""
    """What follows a sample's key in the name of its image, such as left.jpg; "": any suffix of an image."""

    @classmethod
    def parse(cls, text: str, image: str = "") -> "LabelRule":
        """Raises UserError for an unknown rule."""
        kind, _, field = text.partition(":")
        fields, image = tuple(field.split(".")), image.lower().lstrip(".")
        if image and suffix_of(f"x.{image}") not in IMAGE_SUFFIXES:
            raise UserError(f"--image: {image!r} does not end as an image does ({SUFFIXES_TEXT}); write left.jpg")
        if kind == "json" and all(fields):
            return cls("json", fields, image)
        if text not in ("cls", "key"):
            raise UserError(f"--label: {text!r}; write {_FORMS}")
        return cls("cls" if text == "cls" else "key", image=image)

    @property
    def text(self) -> str:
        rule = ":".join(filter(None, (self.kind, ".".join(self.fields))))
        return f"{rule}, image {self.image}" if self.image else rule

    def is_image(self, suffix: str) -> bool:
        """Whether the member of a sample with this suffix (all behind the key's dot) is its image."""
        return suffix == self.image if self.image else suffix in IMAGE_SUFFIXES

    def read(self, key: str, data: bytes) -> int | str:
        """A class number, or a class name. `data` are the bytes of its member with the suffix `kind`.

        Raises ValueError with a text that completes "the label of sample ...".
        """
        if self.kind == "key":
            return _from_key(key)
        return _from_cls(data) if self.kind == "cls" else self._from_json(data)

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
        number = int(value) if isinstance(value, float) and value.is_integer() else value  # 2.0 is 2
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= MAX_LABEL:
            return number
        raise ValueError(f"is {value!r}, neither a class number nor a class name")


def _from_cls(data: bytes) -> int | str:
    """A whole number, or else a name of one line: n01440764."""
    text = data[:_MAX_NAME].decode("utf-8", "replace").strip()
    try:
        number = float(text)
    except ValueError:
        if not text or len(data) >= _MAX_NAME or not text.isprintable() or "\ufffd" in text:
            raise ValueError(f"is {text[:40]!r}, neither a class number nor a class name") from None
        return text
    if not (number.is_integer() and 0 <= number <= MAX_LABEL):
        raise ValueError(f"is {text!r}, not a class number")
    return int(number)


def obvious_field(data: bytes) -> str:
    """The notation, such as json:label, of the field of a .json that must be the label by its name; or ""."""
    try:
        values: Any = json.loads(data)
    except ValueError:
        return ""
    if not isinstance(values, dict):
        return ""
    for name in _OBVIOUS:
        value = values.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and value != "":
            return f"json:{name}"
    return ""


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
