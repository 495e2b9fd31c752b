"""The k best snapshots of a run: kept while it trains, averaged at its end."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

from dist_trainer.distributed.collectives import on_main, read_on_main
from dist_trainer.distributed.world import World
from dist_trainer.run.weights import Weights
from dist_trainer.run_folder.folder import RunFolder
from dist_trainer.run_folder.snapshots import Snapshot, Snapshots
from dist_trainer.tensors import State
from dist_trainer.tricks.averaging import AveragingConfig, average, chosen_metric, larger_is_better


class Averaging:
    """Snapshots of the weights whose metric the config names. Rank 0 alone writes and reads their files."""

    def __init__(self, config: AveragingConfig, weights: Weights, folder: RunFolder, world: World) -> None:
        """(Collective.) Raises UserError for a metric that is not logged, and for a damaged index of snapshots."""
        scored = weights.logged()
        self.metric = chosen_metric(config, scored)
        self._name, self._key = scored[self.metric]
        self._config, self._weights, self._world, self._writer = config, weights, world, folder.writer
        self._snapshots: Snapshots  # on rank 0

        def open_on_main() -> None:
            self._snapshots = Snapshots(
                folder.snapshots, config.top_k, larger_is_better(self.metric), metric=self.metric
            )

        on_main(world, open_on_main)

    def resume(self, step: int) -> list[str]:
        """Restore the snapshots as of the validation at `step` (collective). Returns a line for what is dropped."""

        def resume_on_main() -> list[str]:
            former = self._snapshots.former_metric
            notes = [f"snapshots are chosen anew: by {self.metric}, so far by {former}"] if former else []
            return [*notes, *self._snapshots.resume(step)]

        return on_main(self._world, resume_on_main)

    def offer(self, name: str, step: int, metrics: dict[str, float]) -> None:
        """Have the weights in the module kept if `name` is tracked and they are among the best (collective)."""
        if name != self._name:
            return
        value = metrics[self._key]

        def would_take() -> bool:
            self._writer.wait("snapshot")
            return self._snapshots.would_take(value)

        if on_main(self._world, would_take):
            tensors = {"model": self._weights.state()}

            def keep(copies: dict[str, State]) -> str | None:
                return self._snapshots.offer(step, value, copies["model"])

            on_main(self._world, lambda: self._writer.submit("snapshot", step, tensors, keep))

    def commit(self, steps: Iterable[int]) -> None:
        """After a save, with the last validation that each kept checkpoint knows of; on the writer's thread."""
        self._snapshots.commit(steps)

    def average_kept(self, score: Callable[[State], float]) -> State | None:
        """The mean of the kept snapshots, uniform or greedy by `score` (collective); None where none was kept."""

        def best_kept() -> list[dict[str, Any]]:
            self._writer.wait()
            return list(map(asdict, self._snapshots.best))

        best = [Snapshot(**each) for each in on_main(self._world, best_kept)]
        if not best:
            return None
        greedy = (lambda name, state: score(state)) if self._config.greedy else None
        members = ((each.file, read_on_main(self._world, partial(self._load, each))) for each in best)
        return average(members, greedy)[0]

    def _load(self, snapshot: Snapshot) -> State:
        return self._snapshots.load(snapshot)
