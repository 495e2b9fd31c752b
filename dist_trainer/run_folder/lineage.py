"""Which of two copies of a run is the other's future: by the starts that each has seen.

lineage.json holds {"id", "step"} of every start, in order: a token, and the step at which training went on.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dist_trainer.storage.atomic import replace_text

LINEAGE = "lineage.json"


class Begin(NamedTuple):
    """One start of a run."""

    id: str
    step: int


def parse(text: str) -> list[Begin]:
    """Raises ValueError for what is no lineage."""
    try:
        return [Begin(str(each["id"]), int(each["step"])) for each in json.loads(text)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no lineage: {error}") from None


def read(run: Path) -> list[Begin]:
    """Of a folder; empty where there is none, as versions before left it, or where it is damaged."""
    try:
        return parse((run / LINEAGE).read_text())
    except (OSError, ValueError):
        return []


def write(run: Path, begins: Sequence[Begin]) -> None:
    entries: list[dict[str, Any]] = [each._asdict() for each in begins]
    replace_text(run / LINEAGE, json.dumps(entries, indent=1) + "\n")


def common(ours: Sequence[Begin], theirs: Sequence[Begin]) -> int:
    """How many starts both have seen."""
    pairs = zip(ours, theirs, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


Copy = Literal["ours", "theirs"]


def ahead(ours: Sequence[Begin], our_step: int, theirs: Sequence[Begin], their_step: int) -> Copy | None:
    """From which copy to go on so that no training is lost; None where they have parted.

    The steps are of their newest checkpoints. A copy has made training of its own if that lies behind the step of its
    first start which the other has not seen. A copy that the other has overtaken, from an earlier step, has lost
    nothing: the steps between were made again.
    """
    shared = common(ours, theirs)
    our_own, their_own = ours[shared:], theirs[shared:]
    we_made = bool(our_own) and our_step > our_own[0].step
    they_made = bool(their_own) and their_step > their_own[0].step
    if our_own and their_own:
        if we_made and they_made:
            return None
        if we_made or they_made:
            return "ours" if we_made else "theirs"
        return "ours" if our_step >= their_step else "theirs"
    if our_step == their_step:
        return "theirs" if their_own else "ours"
    if our_step > their_step:
        return None if they_made else "ours"
    return None if we_made else "theirs"
