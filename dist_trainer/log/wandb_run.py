"""Weights & Biases: one W&B run per training run, from its record. Only here is wandb imported.

A W&B run is a view of metrics.jsonl: `show` sends the rows after the last step that the server has. Offline, each
attempt writes all rows into its own file, which replaces those before it. So each step is there once, whatever ended
the attempts. `_step` is the training step. It runs in its own process (follow.py), or in `dist-trainer wandb-sync`.
"""

import errno
import netrc
import os
import secrets
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from dist_trainer.errors import first_line
from dist_trainer.log.metrics_file import Row
from dist_trainer.log.names import METRICS, VALIDATION, is_evaluation
from dist_trainer.storage.atomic import replace_text

ROOM = 2**16
"""Bytes that a disk must have left for offline files."""
Mode = Literal["online", "offline", "disabled"]


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases. WANDB_* environment variables take precedence over all of these."""

    mode: Mode = "online"
    """online falls back to offline, with a line, without an API key or an answer."""
    project: str = "dist_trainer"
    """The project of the run."""
    entity: str | None = None
    """Null: your default entity."""
    group: str | None = None
    """Runs of one group are shown together."""
    name: str | None = None
    """Null: the run folder's name."""
    tags: list[str] = field(default_factory=list)
    """Words to find the run by."""
    notes: str | None = None
    """A text beside the run."""
    job_type: str | None = None
    """The kind of run, within its group."""
    artifact: Literal["best"] | None = None
    """best: the best weights are uploaded at the end."""
    system: Literal["first", "all", "none"] = "first"
    """Whose load and memory are shown: the first host's; all: others' too, each as a run of its own in the group."""
    timeout: float = 15.0
    """Seconds that W&B may take to answer, at the start and at the end. Training never waits at the start."""


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    state: str
    """As STATE says; "running": it was killed, or still runs."""
    summary: dict[str, Any]
    """summary.json, or empty."""


def whole_rows(rows: list[Row], ending: Ending) -> list[Row]:
    """`rows` without the last one, if the attempt ended where that one's step may get more values from the next one."""
    if rows and ending.state != "done" and rows[-1]["step"] >= ending.summary.get("steps", 0):
        return rows[:-1]
    return rows


def has_key() -> bool:
    """Whether a key is set up. Its value is never looked at."""
    if "WANDB_API_KEY" in os.environ or "WANDB_IDENTITY_TOKEN_FILE" in os.environ:
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False


def mode_of(config: WandbConfig) -> str:
    """online, offline or disabled: as WANDB_MODE or the config says; offline without a key."""
    mode = os.environ.get("WANDB_MODE") or config.mode
    if mode in ("dryrun", "offline") or (mode == "online" and not has_key()):
        return "offline"
    return "online" if mode in ("online", "run", "shared") else "disabled"


def reach(config: WandbConfig) -> tuple[bool, str]:
    """(whether a run could log as the config says, a line). A server is only connected to, for 3 s at most."""
    mode = os.environ.get("WANDB_MODE") or config.mode
    if mode != "online":
        return True, f"W&B: {mode}"
    if not has_key():
        return True, "W&B: no API key set up: writes offline"
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    proxy = urlsplit(getproxies().get(url.scheme, ""))
    host = proxy.hostname or url.hostname or ""
    port = (proxy.port if proxy.hostname else url.port) or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError as error:
        return False, f"W&B: {host}:{port} cannot be reached: {error.strerror or error}"
    return True, f"W&B: {host} can be reached"


def no_answer(timeout: float) -> str:
    """Why W&B's server does not answer to a request, or "": far cheaper than what wandb does before it finds out."""
    import urllib.request

    request = urllib.request.Request(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout).close()
    except (
        OSError,
        ValueError,
    ) as error:  # an HTTP status is an answer, and so is a certificate of an unknown authority
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return f"no answer within {timeout:g} s"
        if isinstance(reason, ConnectionError | socket.gaierror):
            return describe(reason)
    return ""


def run_id(folder: Path) -> str:
    """Of the W&B run. It is in the run folder before the first step, so that a requeued job goes on with the same one.

    WANDB_RUN_ID, which `wandb agent` sets, takes precedence. Raises OSError.
    """
    path = folder / "wandb_id"
    known = path.read_text().strip() if path.exists() else ""
    wanted = os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4)
    if wanted != known:
        replace_text(path, wanted)
    return wanted


def best_weights(folder: Path, config: WandbConfig) -> Path | None:
    """What is to be an artifact, if there is such a thing."""
    return max((folder / "best").glob("step_*"), default=None) if config.artifact else None


def closing_s(folder: Path, config: WandbConfig) -> float:
    """Seconds that `close` may take: W&B's time to answer, and for the best weights a second per MB."""
    best = best_weights(folder, config)
    return config.timeout + (sum(file.stat().st_size for file in best.iterdir()) / 1e6 if best else 0.0)


def describe(error: Exception) -> str:
    """One short line."""
    line = first_line(error)
    return f"{type(error).__name__}: {line if len(line) < 120 else line[:117] + '...'}"


def _known_id(folder: Path, patience: float) -> str:
    """The id that rank 0, on another host, has chosen or is about to choose. Raises TimeoutError."""
    until = time.monotonic() + patience
    while not (folder / "wandb_id").exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{folder} has no wandb_id")
        time.sleep(0.1)
    return (folder / "wandb_id").read_text().strip()


def _own_names(config: WandbConfig, folder: Path, run_id: str, label: str | None) -> dict[str, Any]:
    """Arguments of wandb.init, without those that a WANDB_* variable gives."""
    if config.system == "all":
        config = replace(config, group=config.group or run_id)
    if label is not None:
        config = replace(config, name=f"{config.name or folder.name}: {label}", job_type="host")
    values: dict[str, tuple[str, Any]] = {
        "project": ("WANDB_PROJECT", config.project),
        "entity": ("WANDB_ENTITY", config.entity),
        "group": ("WANDB_RUN_GROUP", config.group),
        "name": ("WANDB_NAME", config.name or folder.name),
        "tags": ("WANDB_TAGS", config.tags or None),
        "notes": ("WANDB_NOTES", config.notes),
        "job_type": ("WANDB_JOB_TYPE", config.job_type),
        "dir": ("WANDB_DIR", str(folder)),
    }
    return {name: value for name, (variable, value) in values.items() if not os.environ.get(variable)}


class WandbRun:
    """`show` rows, then `close`. Raises whatever wandb raises; calls may hang, so the caller watches the time."""

    def __init__(
        self, folder: Path, config: WandbConfig, facts: dict[str, Any], *, mode: str, label: str | None = None
    ) -> None:
        """`facts` become the run's config. With a `label`, the name of another host, this is a run of its own in the
        same group, which shows that host's load alone: several writers of one run would hide what a resumed one has."""
        os.environ.setdefault("WANDB_SILENT", "true")  # settings come too late for what `login` says
        import wandb

        self._folder, self._config, self._is_online = folder, config, mode == "online"
        group = run_id(folder) if label is None else _known_id(folder, config.timeout)
        self._id = group if label is None else f"{group}-{label}"
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=config.timeout,
            x_disable_stats=config.system == "none",
            x_stats_pid=os.getppid(),
            # Neither code nor its differences ever leave this machine.
            disable_code=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
        )
        self._run: Any = wandb.init(
            **_own_names(config, folder, group, label),
            id=self._id,
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if self._is_online else None,
            config=facts,
            settings=settings,
        )
        self.last = -1
        """The last training step that the server has."""
        if self._run.resumed:
            logged = self._run.summary.get("step", -1)
            self.last = max(self._run.starting_step - 1, int(logged or 0))
        self._events: Row = {}
        self._best: dict[str, float] = {}
        if label is None:
            self._define()

    def _define(self) -> None:
        """The axes: epochs for evaluations, steps for all else. `_keep_best` adds the best scores to the summary."""
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("epoch", hidden=True)
        for name in METRICS:
            self._run.define_metric(name, step_metric="epoch" if is_evaluation(name) else "step")

    @property
    def where(self) -> str:
        """Its address, or empty."""
        return str(self._run.url) if self._is_online else ""

    def show(self, rows: Sequence[Row], ending: Ending | None = None) -> int:
        """Send rows of whole steps (metrics_file.by_step) after `last`; returns how many.

        Events of steps that the server has already come with the next row. The last row of a run that is done has the
        picture of predictions.
        """
        if not self._is_online and shutil.disk_usage(self._run.dir).free < ROOM:  # wandb would lose rows in silence
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._run.dir)
        count = 0
        is_done = ending is not None and ending.state == "done"
        for row in rows:
            self._keep_best(row)
            if row["step"] <= self.last:
                self._events |= {name: value for name, value in row.items() if name.startswith("run/")}
                continue
            stamp = {"_timestamp": row["perf/time"]} if "perf/time" in row else {}
            picture = self._picture() if is_done and row is rows[-1] else {}
            self._run.log(self._events | row | stamp | picture, step=row["step"], commit=True)
            self._events, self.last, count = {}, row["step"], count + 1
        if self._best:
            self._run.summary.update(self._best)
        return count

    def _keep_best(self, row: Row) -> None:
        """val/top1.max, val/loss.min, ... W&B's own best value would be that of one attempt, and hide the last one."""
        for name in row.keys() & VALIDATION.keys():
            kind, better = ("min", min) if name.endswith("/loss") else ("max", max)
            best = f"{name}.{kind}"
            self._best[best] = better(self._best.get(best, row[name]), row[name])

    def remove_older(self) -> None:
        """Remove offline files of earlier attempts: this one's holds all their rows."""
        if self._is_online:
            return
        own = Path(self._run.dir).parent
        for other in own.parent.glob(f"offline-run-*-{self._id}"):
            if other != own:
                shutil.rmtree(other, ignore_errors=True)

    def artifact(self) -> str:
        """Hand over the best weights, if so configured; `close` waits until they are uploaded. Returns a line."""
        best = best_weights(self._folder, self._config)
        if best is None:
            return ""
        import wandb

        artifact = wandb.Artifact(
            f"best-{self._id}", type="model", metadata={"step": int(best.name.rpartition("_")[2])}
        )
        artifact.add_dir(str(best))
        self._run.log_artifact(artifact, aliases=["best"])
        return f"W&B: {best.name} of best/ is artifact best-{self._id}"

    def _picture(self) -> dict[str, Any]:
        """The grid of validation images with predictions, if the run has drawn it."""
        import wandb

        file = self._folder / "predictions.png"
        return {"predictions": wandb.Image(str(file))} if file.exists() else {}

    def close(self, ending: Ending, *, alerts: bool = True) -> None:
        """Its last words: summary, alert, and how it ended.

        A stopped run goes on later, so W&B calls it preempted, and a sweep hands its trial out again. Not one that
        `wandb agent` has ended, by SIGTERM, since the sweep gave the trial up.
        """
        for name, value in ending.summary.items():
            self._run.summary[name] = value
        if alerts and ending.state in ALERTS:
            reason = ending.summary.get("reason") if ending.state != "running" else None
            self._run.alert(f"{self._folder.name}: {ALERTS[ending.state]}", reason or "", level="ERROR")
        given_up = bool(os.environ.get("WANDB_SWEEP_ID")) and ending.summary.get("reason") in ("SIGTERM", "SIGINT")
        if ending.state in ("stopped", "interrupted") and not given_up:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if ending.state == "done" else 1)


ALERTS = {"mistake": "stopped by an error", "fault": "crashed", "running": "killed"}
"""STATE -> what an alert says. "running" has no summary of its own."""
