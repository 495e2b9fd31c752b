"""One bit of one weight is another one on the last rank: `main(world, [FOLDER, ARGV...])`.

Each rank writes what `save` says then to FOLDER/said-R.
"""

from pathlib import Path

import torch

from dist_trainer.config import arguments
from dist_trainer.distributed.processes import StopRequest
from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.run.start import build_run, prepare_run
from dist_trainer.run.summary import finish_run
from dist_trainer.train import save


def main(world: World, argv: list[str]) -> None:
    config, _ = arguments.parse_config(arguments.new_parser("train", ""), argv[1:])
    silent = Terminal(active=False)
    prepared = prepare_run(config, stem="bit", world=world, terminal=silent)
    run = build_run(prepared, config=config, world=world, terminal=silent, stop=StopRequest())
    if world.rank == world.size - 1:
        dict(run.learner.engine.module.named_parameters())["conv2.weight"].data.view(torch.int32)[3, 2, 1, 0] ^= 1
    try:
        save(run)
    except UserError as error:
        (Path(argv[0]) / f"said-{world.rank}").write_text(str(error))
    finish_run(run, "stopped", "test")
