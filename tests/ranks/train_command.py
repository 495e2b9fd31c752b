"""The command `train` as a user types it, in a working folder: `main(world, [FOLDER, OUTPUT, LATER, *argv])`.

Rank 0 writes what it printed, or why it refused, to OUTPUT. With LATER the config has one more key, which is off.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_trainer.commands import train
from dist_trainer.config.tree import TrainConfig
from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.run_folder.identity import KEYS, First


@dataclass(frozen=True, kw_only=True)
class LaterConfig(TrainConfig):
    """That of a version with one more trick."""

    later: bool = False


def main(world: World, argv: list[str]) -> None:
    folder, output, later = Path(argv[0]), Path(argv[1]), bool(argv[2])

    @contextlib.contextmanager
    def ranks(timeout_s: float) -> Iterator[tuple[World, Terminal]]:
        yield world, Terminal(active=world.is_main)  # they are joined already, and stay so

    parse = train.parse_config

    def parse_later(parser: Any, argv: list[str]) -> tuple[TrainConfig, Any]:
        config, values = parse(parser, argv)
        return LaterConfig(**{name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}), values

    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stdout(said))
        for name, value in (("ranks", train.ranks), ("parse_config", parse)):
            stack.callback(setattr, train, name, value)
        train.ranks = ranks
        if later:
            stack.callback(KEYS.pop, "later")
            KEYS["later"] = First(False)
            train.parse_config = parse_later
        try:
            train.command(argv[3:])
        except UserError as error:
            print(f"refused: {error}")
    if world.is_main:
        output.write_text(said.getvalue())
