"""The run folder: its layout, and the small files that other programs read."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from dist_trainer.distributed.processes import ATTEMPT
from dist_trainer.errors import Form, NotNegative, Seconds, UserError
from dist_trainer.run_folder import checkpoint, lineage
from dist_trainer.run_folder.background import BackgroundWriter
from dist_trainer.run_folder.checkpoint import CheckpointConfig
from dist_trainer.run_folder.environment import describe_environment
from dist_trainer.run_folder.identity import (
    FREE,
    Change,
    changes,
    check_allowed,
    flatten,
    is_fixed,
    read_identity,
    row_of,
)
from dist_trainer.run_folder.mirror import Mirror
from dist_trainer.run_folder.owner import Ownership
from dist_trainer.run_folder.uploader import Uploader
from dist_trainer.run_folder.what_follows import read_state
from dist_trainer.storage.atomic import replace_text
from dist_trainer.storage.secret import refuse_secret_url
from dist_trainer.storage.storage import check_protocol, is_remote

State = Literal["running", "done", "stopped", "failed", "mistake", "fault", "interrupted"]
"""Of a run. Only a SIGKILL or a loss of power leaves "running" behind; the others are ends (errors.EXIT_STATUS).
failed: its checkpoints could not be written."""


FolderName = Annotated[
    str, Form("a folder's name, such as r50_a, without /", lambda text: "/" not in text and text not in ("", ".", ".."))
]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives, and its seed."""

    dir: str = "runs"
    """Where run folders are made. A URL: in a scratch folder of the host, with this as `mirror`."""
    mirror: str | None = None
    """A second copy of each run folder is kept here, at any URL that fsspec knows (s3://bucket/runs) or path; a run
    whose folder is missing goes on from it, on any host."""
    name: FolderName = "auto"
    """auto: the config's stem and 8 hex digits of what changes the result, so that starting again resumes."""
    timeout: Seconds = 600.0
    """Seconds without progress after which a rank writes the stacks of its threads to stacks/ and ends; ranks that wait
    for another one end a minute later."""
    seed: NotNegative = 0
    """Of initial weights, order, augmentation and dropout."""
    deterministic: bool = False
    """The same bits each time on the same devices, with slower kernels; an operation without one ends the run, by name.
    On CPUs runs are deterministic anyway."""
    start_from: str | None = None
    """A new run begins with another one's weights: RUN or RUN@STEP, a folder or a name in run.dir; RUN+optimizer: with
    its momentum and moving average too. The rate and the order of samples begin anew."""
    allow_change: list[str] = field(default_factory=list)
    """Keys that may have another value than the run was started with: it goes on with the new one."""

    @property
    def root(self) -> Path:
        """Where run folders are made on this host."""
        if not is_remote(self.dir):
            return Path(self.dir).expanduser()
        return Path(tempfile.gettempdir()) / f"dist_trainer-{os.getuid()}" / re.sub(r"[^\w.-]+", "-", self.dir)

    @property
    def mirror_root(self) -> str | None:
        """Where their copies are kept."""
        return self.dir if is_remote(self.dir) else self.mirror

    def check(self) -> None:
        """Raises UserError for places that exclude each other, or hold a secret, and for keys that do not exist."""
        check_allowed(self.allow_change)
        if is_remote(self.dir) and self.mirror:
            raise UserError(f"run.mirror: {self.mirror}: run.dir is a URL, and is the mirror itself; leave one out")
        for key, place in (("run.dir", self.dir), ("run.mirror", self.mirror)):
            if place is not None and is_remote(place):
                refuse_secret_url(place)
                check_protocol(key, place)


@dataclass(frozen=True)
class Start:
    """What a run folder tells of a start."""

    state: str
    """How it ended; "running": it was killed."""
    attempt: str | None
    """Its name, if a launcher gave one."""
    world: int | None
    """Its number of ranks."""


class RunFolder:
    """`path`, owned by this process from `claim` until `release`. Used on rank 0 alone."""

    def __init__(self, path: Path, saving: CheckpointConfig | None = None, mirror: Mirror | None = None) -> None:
        self.path = path
        self._ownership = Ownership(path)
        saving = saving or CheckpointConfig()
        self.writer = BackgroundWriter(path, saving.max_failed, in_background=saving.background)
        """Of everything that is large."""
        self.uploader = Uploader(mirror, path) if mirror is not None else None
        """Of the second copy, if there is to be one."""

    def claim(self, say: Callable[[str], None] = print) -> None:
        """Become the owner of the folder, and of its mirror, and bring it up to date from that; `say` tells of it.

        Raises UserError while another live trainer is, and for a mirror that has parted from the folder.
        """
        self._ownership.claim(say)
        if self.uploader is not None:
            try:
                self.uploader.claim(say)
            except BaseException:
                self._ownership.release()
                raise

    def begin(self, step: int) -> None:
        """Training goes on from `step`: the folder and its mirror remember this start."""
        begins = [*lineage.read(self.path), lineage.Begin(self.token, step)]
        lineage.write(self.path, begins)
        if self.uploader is not None:
            self.uploader.begin(begins)

    @property
    def token(self) -> str:
        """Of this process's claim; `owner.read_owner` finds it in the folder that it claimed."""
        return self._ownership.token

    def check_owner(self) -> None:
        """Raises LocalError if another trainer has taken the folder, or its mirror."""
        self._ownership.check()
        if self.uploader is not None:
            self.uploader.check()

    def release(self) -> None:
        if self.uploader is not None:
            self.uploader.release()
        self._ownership.release()

    def has_checkpoints(self) -> bool:
        """Here or, where there are none, in the mirror. Raises UserError where that cannot be read."""
        if checkpoint.complete(self.checkpoints):
            return True
        return self.uploader is not None and self.uploader.has_checkpoints()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def snapshots(self) -> Path:
        """The k best, for averaging."""
        return self.path / "snapshots"

    @property
    def average(self) -> Path:
        return self.path / "average"

    @property
    def bad_samples(self) -> Path:
        return self.path / "bad_samples.jsonl"

    def standing(self) -> str:
        """Where the run in it stands, in words."""
        state, kept = self.read_state(), checkpoint.complete(self.checkpoints)
        if state is None:
            return "not begun"
        return f"{state}, " + (f"at {kept[0].name}" if kept else "no checkpoint yet")

    def write_pretrained(self, loaded: dict[str, Any]) -> None:
        """pretrained.json: the source of the initial weights, and every name that did not fit."""
        replace_text(self.path / "pretrained.json", json.dumps(loaded, indent=1) + "\n")

    def check_identity(self, identity: Mapping[str, Any], allow_change: Collection[str]) -> list[Change]:
        """The accepted changes of keys that count, none in a new folder.

        Raises UserError listing old -> new for a change that `allow_change` does not name, or that no run can make.
        """
        found = read_identity(self.path)
        if found is None:
            return []
        changed = changes(found[0], identity)
        fixed = [change for change in changed if is_fixed(change.key)]
        if fixed:
            raise UserError(
                f"{self.path} was started with other values, which a run cannot change: {'; '.join(map(str, fixed))}. "
                f"Use another --run.name; --run.start_from {self.path} begins with its weights"
            )
        refused = [change for change in changed if change.key not in allow_change]
        if refused:
            keys = json.dumps([change.key for change in changed])
            raise UserError(
                f"{self.path} was started with other values: {'; '.join(map(str, refused))}. Use another --run.name, "
                f"or accept with --run.allow_change '{keys}'"
            )
        return changed

    def free_changes(self, config: Mapping[str, Any]) -> list[Change]:
        """Keys that may change at every start and have, such as those of evaluation and logging."""
        try:
            old = flatten(yaml.safe_load((self.path / "config.yaml").read_text()))
        except (OSError, yaml.YAMLError, AttributeError):
            return []
        return [change for change in changes(old, flatten(config)) if row_of(change.key) == FREE and change.key in old]

    def write_config(
        self,
        config: Mapping[str, Any],
        identity: Mapping[str, Any],
        *,
        val_fingerprint: str,
        changed: Sequence[Change],
        step: int,
    ) -> None:
        """config.yaml, identity.json and, where keys `changed` at `step`, changes.json, which keeps all changes."""
        history = [*self.read_changes(), *({"step": step, **asdict(change)} for change in changed)]
        if changed:
            replace_text(self.path / "changes.json", json.dumps(history, indent=1) + "\n")
        keys = {**identity, "data.val_fingerprint": val_fingerprint}
        replace_text(self.path / "identity.json", json.dumps(keys, indent=1, sort_keys=True))
        header = "".join(
            f"# from step {each['step']}: {Change(each['key'], each['old'], each['new'])}\n" for each in history
        )
        replace_text(self.path / "config.yaml", header + yaml.safe_dump(dict(config), sort_keys=False))

    def read_changes(self) -> list[dict[str, Any]]:
        """{"step", "key", "old", "new"} of every change of a key that counts, in order."""
        try:
            history: list[dict[str, Any]] = json.loads((self.path / "changes.json").read_text())
            return history
        except FileNotFoundError:
            return []

    def read_val_fingerprint(self) -> str | None:
        """That of the validation set that the run was last scored on; None in a new folder."""
        found = read_identity(self.path)
        return found[1] if found is not None else None

    def write_environment(self, world_size: int, total_steps: int) -> None:
        """env.json: enough to know later what ran, and for how long it was meant to."""
        environment = {**describe_environment(world_size), "total_steps": total_steps}
        replace_text(self.path / "env.json", json.dumps(environment, indent=1))

    def write_state(self, state: State) -> None:
        """STATE: batch scripts decide from it, since exit codes under torchrun are not reliable.

        Its second line is the attempt's name, if a launcher gave one: what another attempt left tells nothing of this.
        """
        attempt = os.environ.get(ATTEMPT)
        replace_text(self.path / "STATE", f"{state}\n" + (f"{attempt}\n" if attempt else ""))

    def read_state(self) -> str | None:
        """Of the last attempt; None in a folder without a run."""
        return read_state(self.path)[0]

    def last_start(self) -> Start | None:
        """The start before this one, as long as this one has written nothing; None in a new folder."""
        state, attempt = read_state(self.path)
        if state is None:
            return None
        try:
            world = json.loads((self.path / "env.json").read_text())["world"]
        except (OSError, ValueError, KeyError):
            world = None
        return Start(state, attempt, world)

    def runs_in_this_attempt(self) -> bool:
        """Whether no end of this attempt is recorded, and it has begun."""
        return read_state(self.path) == ("running", os.environ.get(ATTEMPT))

    def write_summary(self, summary: dict[str, Any]) -> None:
        replace_text(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        try:
            summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
            return summary
        except FileNotFoundError:
            return None
