"""The k best snapshots of a run: kept while it trains, averaged at its end."""

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
    """Snapshots of the weights whose metric the config names. Rank 0 writes the files, every rank reads them."""

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
        better = larger_is_better(self.metric)
        self._snapshots = Snapshots(self._folder, self._config.top_k, better, metric=self.metric)

    def resume(self, step: int) -> list[str]:
        """Restore the snapshots as of the validation at `step` (collective). Returns a line for what is dropped."""
        former = self._snapshots.former_metric
        notes = [f"snapshots are chosen anew: by {self.metric}, so far by {former}"] if former else []
        return [*notes, *on_main(self._world, lambda: self._snapshots.resume(step))]

    def offer(self, name: str, step: int, metrics: dict[str, float]) -> str | None:
        """Keep the weights in the module if `name` is tracked and they are among the best (collective). Returns a line
        if they are not finite."""
        if name != self._name:
            return None
        value = metrics[self._key]
        if not on_main(self._world, lambda: self._snapshots.would_take(value)):
            return None
        state = self._weights.state()
        return on_main(self._world, lambda: self._snapshots.offer(step, value, state))

    def commit(self, steps: Iterable[int]) -> None:
        """Call on rank 0 after a save, with the last validation that each kept checkpoint knows of."""
        self._snapshots.commit(steps)

    def average_kept(self, score: Callable[[State], float]) -> State | None:
        """The mean of the kept snapshots, uniform or greedy by `score` (collective); None where none was kept."""
        self._open()  # rank 0's files, on every rank
        if not self._snapshots.best:
            return None
        greedy = (lambda name, state: score(state)) if self._config.greedy else None
        return average(self._snapshots.members(), greedy)[0]
