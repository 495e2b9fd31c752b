"""How a run went on, in words: after a requeue, a restart, a roll-back, on another number of ranks."""

from dist_trainer.errors import plural
from dist_trainer.run_folder.folder import Start

AFTER = {
    "running": "it was killed",
    "stopped": "a stop",
    "failed": "checkpoints that failed",
    "mistake": "a mistake",
    "fault": "a fault",
    "interrupted": "an interruption",
    "done": "its end",
}
"""STATE of the attempt before -> what that was."""


def how_it_goes_on(before: Start, *, attempt: str | None, world: int, step: int, rolled_back: bool) -> str:
    """One line. `world`, `attempt`: of now; attempts are JOB.RESTARTS.CRASHES (slurm/train.sbatch)."""
    if rolled_back:
        what = "rolled back"
    else:
        job, _, restarts = (attempt or "").partition(".")
        job_before, _, restarts_before = (before.attempt or "").partition(".")
        requeued = job == job_before and restarts.partition(".")[0] != restarts_before.partition(".")[0]
        what = "requeued" if requeued else "started again"
        what += f" after {AFTER.get(before.state, before.state)}"
    instead = f" instead of {before.world}" if before.world not in (None, world) else ""
    return f"{what}: goes on at step {step} on {plural(world, 'rank')}{instead}"
