"""The one exception for what the user can mend: printed as one line, exit status 2, no traceback."""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any


class UserError(Exception):
    """Bad input. The message is one line that names the thing, the value and what to do."""


class LocalError(UserError):
    """A UserError that only this rank knows of, so this rank has to print it."""


class Outage(LocalError):
    """Storage failed after all retries. Nothing is wrong with the data; a later attempt may succeed."""


EXIT_STATUS = {"done": 0, "stopped": 3, "mistake": 2, "fault": 1, "interrupted": 130}
"""How a command ends -> its exit status. Stopped: by a signal, saved. Mistake: the user's, in one line. Fault: an error
of the program or the machine. Interrupted: by a second signal, at once."""


@dataclass(frozen=True)
class Form:
    """Of the value at a key, as in Annotated[str, Form(...)]: what it has to be, with an example, and whether it is."""

    words: str
    fits: Callable[[Any], bool]


Positive = Annotated[int, Form("a whole number, 1 or more", lambda value: value >= 1)]
NotNegative = Annotated[int, Form("a whole number, 0 or more", lambda value: value >= 0)]
Seconds = Annotated[float, Form("a number of seconds above 0", lambda value: value > 0)]


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known word, or an empty string."""
    plain = {_plain(each): each for each in known}
    found = [plain[each] for each in difflib.get_close_matches(_plain(word), list(plain), n=1, cutoff=0.6)]
    return f"; did you mean {found[0]!r}?" if found else ""


def _plain(word: str) -> str:
    """adamW and AdamW are adamw, CrossEntropy is cross_entropy."""
    return word.lower().replace("-", "").replace("_", "")


def some(names: Iterable[object], limit: int = 3) -> str:
    """`a, b, c ...`: the first few of many names."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:limit]) + (" ..." if len(listed) > limit else "")


def plural(number: float, noun: str) -> str:
    """`1 rank`, `2,000 ranks`; `1 class`, `2.5 classes`; `2 batches`."""
    figure = f"{number:,}" if isinstance(number, int) else f"{number:,g}"
    return f"{figure} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "tch")) else "s")


def readable_size(num_bytes: float) -> str:
    """Such as 849 MB."""
    scale, unit = next((each for each in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= each[0]), (1e3, "kB"))
    return f"{num_bytes / scale:.3g} {unit}"


def first_sentence(text: str) -> str:
    """Without its full stop."""
    return re.split(r"(?<=[^.]{3})\. (?=[A-Z])|\.$", text, maxsplit=1)[0]


def first_line(error: Exception) -> str:
    """The first line of another library's exception, for a message of one line."""
    return str(error).strip().partition("\n")[0]
