"""The k best weights of a run: kept while it trains, averaged at its end."""

from collections.abc import Callable, Iterable
from pathlib import Path

from dist_trainer.distributed.collectives import on_main
from dist_trainer.distributed.world import World
from dist_trainer.log.tracker import SCORES
from dist_trainer.run.weights import Weights
from dist_trainer.run_folder.snapshots import Snapshots
from dist_trainer.tensors import State
from dist_trainer.tricks.averaging import AveragingConfig, average, chosen_metric, larger_is_better


class Averaging:
    """Snapshots of those weights whose metric the config names. Files are rank 0's to write, every rank's to read."""

    def __init__(self, config: AveragingConfig, weights: Weights, folder: Path, world: World) -> None:
        """Raises UserError for a metric that is not logged, and for a damaged index of snapshots."""
        prefixes = {SCORES[name][0]: name for name in weights.all_names}
        logged = [f"{prefix}/{key}" for prefix in prefixes for key in ("top1", "top5", "loss")]
        self.metric = chosen_metric(config, logged)
        prefix, self._key = self.metric.split("/")
        self._name = prefixes[prefix]
        self._config, self._weights, self._world = config, weights, world
        self._folder = folder
        self._open()

    def _open(self) -> None:
        self._snapshots = Snapshots(self._folder, self._config.top_k, larger_is_better(self.metric))

    def resume(self, step: int) -> list[str]:
        """Go back to what was kept as of the validation at `step` (collective); a line for each file that is gone."""
        return on_main(self._world, lambda: self._snapshots.resume(step))

    def offer(self, name: str, step: int, metrics: dict[str, float]) -> str | None:
        """Keep what the module holds, if it is these weights and among the best (collective); a line if not."""
        if name != self._name:
            return None
        value = metrics[self._key]
        if not on_main(self._world, lambda: self._snapshots.would_take(value)):
            return None
        state = self._weights.state()
        return on_main(self._world, lambda: self._snapshots.offer(step, value, state))

    def commit(self, steps: Iterable[int]) -> None:
        """To be called on rank 0 after a checkpoint was saved: the validations that the kept checkpoints know of."""
        self._snapshots.commit(steps)

    def average(self, score: Callable[[State], float]) -> State | None:
        """The mean of the kept snapshots, uniform or greedy by `score` (collective); None where none was kept."""
        self._open()  # rank 0's files, on every rank
        if not self._snapshots.best:
            return None
        greedy = (lambda name, state: score(state)) if self._config.greedy else None
        return average(self._snapshots.members(), greedy)[0]
