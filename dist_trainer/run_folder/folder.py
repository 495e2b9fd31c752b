"""The run folder: its name, its owner, and the small files in it that other programs read."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from dist_trainer.errors import UserError

_HEARTBEAT_S = 10.0
_STALE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives, and its seed."""

    dir: str = "runs"
    """Where run folders are made."""
    name: str = "auto"
    """auto: the config's stem and 8 hex digits of all that changes the result, so that starting again goes on."""
    timeout: float = 600.0
    """Seconds without progress after which a rank writes the stacks of its threads to stacks/ and ends; ranks that wait
    for another one end a minute later."""
    seed: int = 0
    """Of initial weights, order, augmentation and dropout."""
    deterministic: bool = False
    """The same bits each time on the same devices, with slower kernels; an operation that has none ends the run by
    name. On CPUs runs are so anyway."""
    allow_change: list[str] = field(default_factory=list)
    """Keys that may differ from those the run folder was started with."""


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# Not in the run's identity: where things are, how they are spread over machines, how the same numbers are computed;
# and data.preprocess, which fills other keys.
_PLACEMENT = ("run.dir", "run.name", "run.allow_change", "run.timeout", "run.deterministic", "wandb.", "checkpoint.",
              "log.", "data.train", "data.val", "data.workers", "data.cache.", "data.retry.", "data.storage_options",
              "data.max_bad", "data.preprocess", "eval.bad", "engine.backend", "engine.zero", "engine.compile",
              "engine.gradient_checkpointing")  # fmt: skip


def identity(config: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """Every key that changes the result, flat, with the data's fingerprint in the place of their path."""
    flat = {key: value for key, value in _flatten(config).items() if not key.startswith(_PLACEMENT)}
    return {**flat, "data.fingerprint": fingerprint}


def auto_name(stem: str, identity: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{stem}-{digest[:8]}"


def _replace_text(path: Path, text: str) -> None:
    """Write atomically: readers see the old or the new file, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _process_start(pid: int) -> str | None:
    """When process `pid` of this host started, in clock ticks, or None when it does not run (Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class RunFolder:
    """`path`, claimed by this process until `release`. Used on rank 0 alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._released = threading.Event()

    # Ownership

    def claim(self) -> None:
        """Become the folder's owner. Raises UserError while another live trainer is."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / ".lock").open("w") as lock:
                with contextlib.suppress(OSError):  # a file system without locks: the check below must do
                    fcntl.flock(lock, fcntl.LOCK_EX)
                owner = self._read_owner()
                if owner and self._is_live(owner):
                    raise UserError(
                        f"{self.path}: process {owner['pid']} on {owner['host']} is training there"
                        f"{' (job ' + owner['job'] + ')' if owner.get('job') else ''}; "
                        "wait for it, stop it, or choose another --run.name"
                    )
                self._beat()
        except OSError as error:
            raise UserError(f"run.dir: cannot write {self.path}: {error.strerror or error}") from None
        threading.Thread(target=self._beat_on, daemon=True, name="run folder heartbeat").start()

    def _read_owner(self) -> dict[str, Any] | None:
        try:
            owner: dict[str, Any] = json.loads((self.path / "owner.json").read_text())
            return owner
        except (OSError, ValueError):
            return None

    def _is_live(self, owner: dict[str, Any]) -> bool:
        if owner.get("host") == socket.gethostname():
            return _process_start(int(owner["pid"])) == owner.get("started")
        return bool(time.time() - float(owner.get("heartbeat", 0)) < _STALE_S)

    def _beat(self) -> None:
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "heartbeat": time.time(),
        }
        _replace_text(self.path / "owner.json", json.dumps(owner))

    def _beat_on(self) -> None:
        while not self._released.wait(_HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a full disk must not end the thread; the next beat may pass
                self._beat()

    def release(self) -> None:
        self._released.set()
        (self.path / "owner.json").unlink(missing_ok=True)

    # What is in it

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
        """pretrained.json: what the weights were that the run began with, and every name of them that did not fit."""
        _replace_text(self.path / "pretrained.json", json.dumps(loaded, indent=1) + "\n")

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
        _replace_text(path, json.dumps(identity, indent=1, sort_keys=True))
        _replace_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        return notes

    def write_environment(self, world_size: int) -> None:
        """env.json: enough to know later what ran. The environment's variables stay out: they hold secrets."""
        packages = {}
        for name in ("torch", "torchvision", "deepspeed", "timm", "webdataset", "numpy"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                packages[name] = importlib.metadata.version(name)
        environment = {
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": packages,
            "host": socket.gethostname(),
            "world": world_size,
            "threads": torch.get_num_threads(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "job": os.environ.get("SLURM_JOB_ID"),
            "git": git_revision(),
        }
        _replace_text(self.path / "env.json", json.dumps(environment, indent=1))

    def write_state(self, state: Literal["running", "stopped", "done"]) -> None:
        """STATE: what a batch script decides from, since exit codes under torchrun lie."""
        _replace_text(self.path / "STATE", state + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        _replace_text(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        try:
            summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
            return summary
        except FileNotFoundError:
            return None


def git_revision() -> str | None:
    """The revision of the working folder, with `+` when files differ from it; None outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
