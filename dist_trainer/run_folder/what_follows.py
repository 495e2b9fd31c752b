"""What is to follow the end of an attempt at a run, for scripts that launch: decided from its STATE.

No torch here: a job that is preempted has seconds to decide.
"""

import json
from pathlib import Path
from typing import Literal

from dist_trainer.errors import EXIT_STATUS
from dist_trainer.storage.atomic import replace_text

Next = Literal["done", "end", "requeue", "restart"]
"""done: the last step is made. end: for good, for another reason. requeue: it was stopped and saved; or it crashed
again, maybe for a host that is lost, which a scheduler notices minutes later. restart: it crashed; again, at once."""
MAX_CRASHES = 3
"""Crashes without a new checkpoint in between that are followed by another attempt."""


def read_state(run: Path) -> tuple[str | None, str | None]:
    """(state, attempt) as STATE has them. (None, None) in a folder without a run; an attempt without a name is None."""
    try:
        state, _, attempt = (run / "STATE").read_text().partition("\n")
    except FileNotFoundError:
        return None, None
    return state.strip(), attempt.strip() or None


def what_follows(run: Path, attempt: str | None, status: int) -> tuple[Next, str]:
    """(what to do after this attempt, which ended with `status`, a line that says why).

    The state of another attempt tells nothing of this one, which then ended before it began: only there does the
    status count, and only that of a mistake. Crashes are counted in the run folder. Raises OSError.
    """
    state, of = read_state(run)
    if of != attempt:
        state = None
    if state is None and status == EXIT_STATUS["mistake"]:
        return "end", f"{run}: a mistake, before the run began"
    if state == "stopped":
        return "requeue", f"{run}: stopped and saved; to be continued"
    if state == "done":
        return "done", f"{run}: done"
    if state in ("failed", "mistake", "interrupted"):
        return "end", f"{run}: {state}"
    count, at = _count_crash(run)
    how = {None: "ended before the run began", "running": "was killed"}.get(state, "had a fault")
    if count > MAX_CRASHES:
        return "end", f"{run}: {how}, for the {count}th time since {at or 'the start'}: look at the lines above"
    return (
        "restart" if count == 1 else "requeue",
        f"{run}: {how}; again, {count} of {MAX_CRASHES} since {at or 'the start'}",
    )


def newest(run: Path) -> str | None:
    """The name of the newest checkpoint."""
    return max((manifest.parent.name for manifest in run.glob("checkpoints/step_*/MANIFEST.json")), default=None)


def _count_crash(run: Path) -> tuple[int, str | None]:
    """(crashes since the newest checkpoint, its name), with this one."""
    path, at, count = run / "crashes.json", newest(run), 0
    try:
        known = json.loads(path.read_text())
        count = int(known["count"]) if known["checkpoint"] == at else 0
    except (OSError, ValueError, KeyError, TypeError):
        pass
    run.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"checkpoint": at, "count": count + 1}))
    return count + 1, at
