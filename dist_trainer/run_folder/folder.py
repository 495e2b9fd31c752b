"""The run folder: its layout, and the small files that other programs read."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_trainer.errors import UserError
from dist_trainer.run_folder.environment import describe_environment
from dist_trainer.run_folder.owner import Ownership
from dist_trainer.storage.atomic import replace_text


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives, and its seed."""

    dir: str = "runs"
    """Where run folders are made."""
    name: str = "auto"
    """auto: the config's stem and 8 hex digits of everything that changes the result, so that starting again resumes.
    """
    timeout: float = 600.0
    """Seconds without progress after which a rank writes the stacks of its threads to stacks/ and ends; ranks that wait
    for another one end a minute later."""
    seed: int = 0
    """Of initial weights, order, augmentation and dropout."""
    deterministic: bool = False
    """The same bits each time on the same devices, with slower kernels; an operation without one ends the run, by name.
    On CPUs runs are deterministic anyway."""
    allow_change: list[str] = field(default_factory=list)
    """Keys that may differ from those the run folder was started with."""


class RunFolder:
    """`path`, owned by this process from `claim` until `release`. Used on rank 0 alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ownership = Ownership(path)

    def claim(self) -> None:
        """Become the folder's owner. Raises UserError while another live trainer is."""
        self._ownership.claim()

    def release(self) -> None:
        self._ownership.release()

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

    def write_pretrained(self, loaded: dict[str, Any]) -> None:
        """pretrained.json: the source of the initial weights, and every name that did not fit."""
        replace_text(self.path / "pretrained.json", json.dumps(loaded, indent=1) + "\n")

    def write_config(self, config: dict[str, Any], identity: dict[str, Any], allow_change: list[str]) -> list[str]:
        """Write config.yaml; returns a line per accepted change.

        Raises UserError listing old -> new when the folder was started with another value of a key that
        changes the result and `allow_change` does not name it.
        """
        path = self.path / "identity.json"
        notes = []
        if path.exists():
            old = json.loads(path.read_text())
            changed = [key for key in sorted({*old, *identity}) if old.get(key) != identity.get(key)]
            accepted = [key for key in changed if key in allow_change]
            refused = [f"{key} {old.get(key)!r} -> {identity.get(key)!r}" for key in changed if key not in accepted]
            if refused:
                raise UserError(
                    f"{self.path} was started with other values: {'; '.join(refused)}. Use another --run.name, or "
                    f"accept with --run.allow_change '{json.dumps(changed)}'"
                )
            notes = [f"changed: {key} {old.get(key)!r} -> {identity.get(key)!r}" for key in accepted]
        replace_text(path, json.dumps(identity, indent=1, sort_keys=True))
        replace_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        return notes

    def write_environment(self, world_size: int) -> None:
        """env.json: enough to know later what ran."""
        replace_text(self.path / "env.json", json.dumps(describe_environment(world_size), indent=1))

    def write_state(self, state: Literal["running", "stopped", "done"]) -> None:
        """STATE: batch scripts decide from it, since exit codes under torchrun are not reliable."""
        replace_text(self.path / "STATE", state + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        replace_text(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        try:
            summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
            return summary
        except FileNotFoundError:
            return None
