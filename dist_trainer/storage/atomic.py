"""Files that readers see whole or not at all: written under another name, then renamed into place."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """The temporary path to write in this block; it becomes `path` when the block ends without an error.

    The file gets the permissions of a new file, whatever library wrote it. `durable`: it is on the disk before it
    takes its name. `shared`: several processes may write `path` at the same time. Raises OSError; `path` is then as it
    was, and the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}" if shared else f".{path.name}")
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        yield temporary
        temporary.chmod(permissions)
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    except BaseException:  # also Ctrl-C
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str, *, durable: bool = False, shared: bool = False) -> None:
    """Write a small text file, as `replacing` does."""
    with replacing(path, durable=durable, shared=shared) as temporary:
        temporary.write_text(text)
