"""The ranks of a command: joined at its start, left in order at its end."""

import contextlib
from collections.abc import Iterator

from dist_trainer.distributed.world import World, init_world, shutdown_world
from dist_trainer.log.console import Terminal


@contextlib.contextmanager
def ranks(timeout_s: float = 660.0) -> Iterator[tuple[World, Terminal]]:
    """(this process among the ranks, a terminal that speaks on rank 0 alone). Collectives wait `timeout_s`.

    After an error nothing is shut down, since other ranks may wait in a collective: the process just ends.
    """
    world = init_world(timeout_s)
    yield world, Terminal(active=world.is_main)
    shutdown_world()
