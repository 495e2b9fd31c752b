"""The k best snapshots of a run: kept while it trains, averaged at its end."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from dist_trainer.distributed.collectives import on_main, read_on_main
from dist_trainer.distributed.world import World
from dist_trainer.log.names import SCORES
from dist_trainer.run.weights import Weights
from dist_trainer.run_folder.snapshots import Snapshot, Snapshots
from dist_trainer.tensors import State
from dist_trainer.tricks.averaging import AveragingConfig, average, chosen_metric, larger_is_better


class Averaging:
    """Snapshots of the weights whose metric the config names. Rank 0 alone writes and reads their files."""

    def __init__(self, config: AveragingConfig, weights: Weights, folder: Path, world: World) -> None:
        """(Collective.) Raises UserError for a metric that is not logged, and for a damaged index of snapshots."""
        prefixes = {SCORES[name][0]: name for name in weights.all_names}
        logged = [f"{prefix}/{key}" for prefix in prefixes for key in ("top1", "top5", "loss")]
        self.metric = chosen_metric(config, logged)
        prefix, self._key = self.metric.split("/")
        self._name = prefixes[prefix]
        self._config, self._weights, self._world = config, weights, world
        self._snapshots: Snapshots  # on rank 0

        def open_on_main() -> None:
            self._snapshots = Snapshots(folder, config.top_k, larger_is_better(self.metric), metric=self.metric)

        on_main(world, open_on_main)

    def resume(self, step: int) -> list[str]:
        """Restore the snapshots as of the validation at `step` (collective). Returns a line for what is dropped."""

        def resume_on_main() -> list[str]:
            former = self._snapshots.former_metric
            notes = [f"snapshots are chosen anew: by {self.metric}, so far by {former}"] if former else []
            return [*notes, *self._snapshots.resume(step)]

        return on_main(self._world, resume_on_main)

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
        best = [Snapshot(**each) for each in on_main(self._world, lambda: list(map(asdict, self._snapshots.best)))]
        if not best:
            return None
        greedy = (lambda name, state: score(state)) if self._config.greedy else None
        members = ((each.file, read_on_main(self._world, partial(self._load, each))) for each in best)
        return average(members, greedy)[0]

    def _load(self, snapshot: Snapshot) -> State:
        return self._snapshots.load(snapshot)
