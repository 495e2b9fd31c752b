"""Ranks that run one script of this folder after another: torchrun pool.py FOLDER PID.

Starting ranks costs seconds, most of them imports, so all tests share one start per number of ranks. Rank 0 looks for
FOLDER/NUMBER.json, {"script", "argv"}; every rank calls `script.main(world, argv)`; then FOLDER/NUMBER.done appears.
A script that raises ends all ranks. So does a file `end`, and the death of process PID, which is pytest's.
"""

import gc
import importlib
import itertools
import json
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_trainer.distributed.collectives import on_main
from dist_trainer.distributed.world import init_world, shutdown_world


def next_script(folder: Path, number: int, tests: int) -> dict[str, Any] | None:
    """Wait for the script with this number; None when there is to be none."""
    while True:
        if (folder / "end").exists() or not Path(f"/proc/{tests}").exists():
            return None
        if (folder / f"{number}.json").exists():
            script: dict[str, Any] = json.loads((folder / f"{number}.json").read_text())
            return script
        time.sleep(0.01)  # between two looks at the folder


def main() -> None:
    folder, tests = Path(sys.argv[1]), int(sys.argv[2])
    world = init_world()
    for number in itertools.count():
        script = on_main(world, partial(next_script, folder, number, tests))
        if script is None:
            break
        module = importlib.import_module(script["script"])
        gc.freeze()  # ZeRO 3 collects garbage whenever it begins; what was imported need not be looked at
        module.main(world, script["argv"])
        gc.collect()  # loaders of earlier scripts end their workers
        dist.barrier(world.host_group)
        if world.is_main:
            (folder / f"{number}.done").touch()
    shutdown_world()


if __name__ == "__main__":
    status = 0
    try:
        main()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)  # as the command line does: loaders of earlier jobs are not waited for
