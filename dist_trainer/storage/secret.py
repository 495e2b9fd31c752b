"""Secrets in configs: refused where they stand in clear, read from the environment where `env:NAME` stands."""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from dist_trainer.errors import UserError

_SECRET = re.compile(
    r"key|secret|token|password|passwd|pwd|passphrase|credentials?|authorization|cookies?|signature|sig|sas"
    r"|connectionstring|bearer|auth"
)
_HARMLESS = ("anon", "google_default", "cloud")  # values of gcsfs's token that name a method and hold no secret
_WHERE = "the environment or the storage's own files (such as AWS_PROFILE and ~/.aws, gcloud's, hf auth login)"


def refuse_secrets(key: str, options: Mapping[str, Any]) -> None:
    """Raises UserError, naming the option and the config key `key`, for an option at any depth that looks like a
    secret, and for a URL with one.

    Configs are saved with the run, logged and shared. The value is never shown. `env:NAME` stands for the value of an
    environment variable, which is read when the storage is opened.
    """
    for name, value in options.items():
        harmless = value is None or isinstance(value, bool) or value in _HARMLESS
        if _is_secret(name) and not harmless and not _variable(value):
            raise UserError(
                f"{key}.{name}: a secret has no place in a config, which is saved; write env:NAME, of an environment "
                f"variable, or leave it to {_WHERE}"
            )
        if isinstance(value, str) and "://" in value:
            refuse_secret_url(value)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                refuse_secrets(f"{key}.{name}", inner)


def _variable(value: object) -> str | None:
    """NAME of `env:NAME`."""
    match = re.fullmatch(r"env:([A-Za-z_]\w*)", value) if isinstance(value, str) else None
    return match[1] if match else None


def resolved(value: Any, key: str) -> Any:
    """`value` with each `env:NAME` in it replaced. Raises UserError for a variable that is not set."""
    if isinstance(value, Mapping):
        return {name: resolved(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [resolved(inner, key) for inner in value]
    if (name := _variable(value)) is None:
        return value
    if name not in os.environ:
        raise UserError(f"{key}: env:{name}: the environment variable {name} is not set")
    return os.environ[name]


def _is_secret(name: str) -> bool:
    """By the words in a name: `aws_secret_access_key`, `sasToken`, `X-Amz-Signature`."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower()
    parts = re.split(r"[^a-z0-9]+", words)
    return any(_SECRET.fullmatch(part) for part in [*parts, "".join(parts)])


def refuse_secret_url(location: str) -> None:
    """Raises UserError, which does not show it, for a URL with a password or a signature."""
    url = urlsplit(location)
    secret = next((name for name, _ in parse_qsl(url.query) if _is_secret(name)), "a password" if url.password else "")
    if secret:
        shown = f"{url.scheme}://{url.hostname}{url.path}"
        raise UserError(f"{shown}: the URL holds a secret ({secret}), which would be saved; it belongs in {_WHERE}")
