"""A node of a cluster for the tests of reading and caching: its cache, and a log of what its readers ask for."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cache_jobs import HANG
from faulty_fs import lines
from helpers import message

from dist_trainer.data.index import ShardIndex
from dist_trainer.data.read import Reader
from dist_trainer.errors import UserError
from dist_trainer.storage.cache import CacheConfig
from dist_trainer.storage.storage import RetryConfig

RETRY = RetryConfig(timeout=30, deadline=60)
BLOCK, COUNTS = 16, (100, 70, 33)
NUM_BLOCKS = 7 + 5 + 3
"""Of the fixture `index`: three tars, blocks of 16."""


class Node:
    """A cache folder, and a log of what is asked of the storage that its readers share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._log = folder / "cache", folder / "log"

    def reader(self, index: ShardIndex, *faults: str, size: str = "1GB", **more: Any) -> Reader:
        """Of the index at a URL, as it is; of a local one, through storage that has these faults."""
        faulty = {"faults": list(faults), "log": str(self._log)}
        local = "://" not in index.root
        remote = replace(index, root=f"faulty://{index.root}") if local else index
        options = {**(faulty if local else {}), **more.pop("options", {})}
        config = CacheConfig(dir=str(self.folder), size=size)
        return Reader(remote, **{"options": options, "retry": RETRY, "cache": config, "block": BLOCK, **more})

    @property
    def requests(self) -> list[str]:
        return lines(self._log)

    def blocks(self) -> list[Path]:
        return sorted((self.folder / "blocks").iterdir())

    def parts(self) -> list[Path]:
        return [path for path in self.blocks() if path.suffix == ".part"]


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return message(caught)


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.01)
