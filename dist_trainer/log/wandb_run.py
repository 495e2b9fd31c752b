"""Weights & Biases, on rank 0: one W&B run per training run, continued after a restart. Only here is wandb imported."""

import netrc
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "online"
    """online falls back to offline, with a line, if no API key is set up."""
    project: str = "dist_trainer"
    """The project of the run."""
    entity: str | None = None
    """Null: your default entity."""


def _has_key() -> bool:
    """Whether a key is set up. Its value is never looked at."""
    if "WANDB_API_KEY" in os.environ:
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False


def reach(config: WandbConfig) -> tuple[bool, str]:
    """(whether a run could log as the config says, a line). A server is only connected to, for 3 s at most."""
    mode = os.environ.get("WANDB_MODE", config.mode)
    if mode != "online":
        return True, f"W&B: {mode}"
    if not _has_key():
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


class WandbRun:
    """`log` metrics against `step`. A failure of W&B is printed once and never stops training."""

    def __init__(self, config: WandbConfig, folder: Path, name: str, run_config: dict[str, Any]) -> None:
        self.note = ""
        """A line for the user, or empty."""
        self._run: Any = None
        mode = os.environ.get("WANDB_MODE", config.mode)
        if mode == "disabled":
            return
        if mode == "online" and not _has_key():
            mode, self.note = "offline", "W&B: no API key set up, writing offline"
        try:
            import wandb

            run_id = self._run_id(folder / "wandb_id")
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=mode,  # type: ignore[arg-type]
                dir=str(folder),
                id=run_id,
                name=name,
                resume="allow" if mode == "online" else None,
                config=run_config,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # training continues whatever W&B raises
            self._give_up(error)

    @staticmethod
    def _run_id(path: Path) -> str:
        """Kept in the run folder before the first step, so that a requeued job continues the same W&B run."""
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        return path.read_text().strip()

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self.note = (
            f"W&B: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; continuing without it"
        )

    def log(self, step: int, metrics: Mapping[str, float | int | str | None]) -> None:
        if self._run is not None:
            try:
                known = {name: value for name, value in metrics.items() if value is not None}
                self._run.log({"step": step, **known})
            except Exception as error:
                self._give_up(error)

    def finish(self, summary: dict[str, Any]) -> None:
        if self._run is not None:
            try:
                self._run.summary.update(summary)
                self._run.finish()
            except Exception as error:
                self._give_up(error)
