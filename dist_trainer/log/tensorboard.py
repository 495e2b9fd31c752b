"""log.tensorboard: the record as TensorBoard's event files, by the same names."""

import shutil
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from dist_trainer.log.metrics_file import Row
from dist_trainer.log.wandb_run import Ending


class TensorBoard:
    """Event files in `folder`, begun again by each attempt, so that no step is there twice."""

    title = "tensorboard"

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def show(self, rows: list[Row], ending: Ending | None = None) -> None:
        for row in rows:
            at = row.get("perf/time")
            for name, value in row.items():
                if isinstance(value, str):
                    self._writer.add_text(name, value, row["step"], at)
                elif name not in ("step", "perf/time"):
                    self._writer.add_scalar(name, value, row["step"], at)

    def close(self, ending: Ending) -> None:
        self._writer.close()
