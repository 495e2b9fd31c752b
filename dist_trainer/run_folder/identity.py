"""A run's identity: the keys that change the result, and their digest in the run's name."""

import hashlib
import json
from typing import Any


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# Not in the identity: locations, the layout over machines, how the same numbers are computed;
# and data.preprocess, which fills other keys.
_PLACEMENT = ("run.dir", "run.name", "run.allow_change", "run.timeout", "run.deterministic", "wandb.", "checkpoint.",
              "log.", "data.train", "data.val", "data.workers", "data.cache.", "data.retry.", "data.storage_options",
              "data.max_bad", "data.preprocess", "eval.bad", "engine.backend", "engine.zero", "engine.compile",
              "engine.gradient_checkpointing")  # fmt: skip


def identity(config: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """Every key that changes the result, flat, with the data's fingerprint instead of their path."""
    flat = {key: value for key, value in _flatten(config).items() if not key.startswith(_PLACEMENT)}
    return {**flat, "data.fingerprint": fingerprint}


def auto_name(stem: str, identity: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{stem}-{digest[:8]}"
