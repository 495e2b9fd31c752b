"""The end of a run that does not come to `finish_run`: recorded in its folder, whatever it is and whenever it comes."""

import contextlib
import time
import traceback

import torch

from dist_trainer.data.parallel import loader_fault, silence_loaders
from dist_trainer.distributed.processes import lost_contact, nccl_fault
from dist_trainer.distributed.world import World
from dist_trainer.errors import LocalError, UserError, first_line
from dist_trainer.plan import Plan
from dist_trainer.run.start import PreparedRun
from dist_trainer.run.state import Run
from dist_trainer.run.summary import how_it_ends
from dist_trainer.run_folder.folder import RunFolder, State


class End:
    """On one rank, of the run that `begins` names. Other ranks may hang or be gone."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._folder: RunFolder | None = None
        self._plan: Plan | None = None
        self._step = 0
        self._run: Run | None = None

    def begins(self, prepared: PreparedRun) -> None:
        self._folder, self._plan, self._step = prepared.claim.folder, prepared.blueprint.plan, prepared.claim.step
        self._run = None

    def trains(self, run: Run) -> None:
        self._run = run

    def forgets(self) -> None:
        """The run is over, and another one of the same folder begins."""
        self._step, self._run = self.step, None

    @property
    def step(self) -> int:
        return self._step if self._run is None else self._run.progress.step

    def record(self, state: State, reason: str) -> None:
        """Write summary.json and STATE, unless an end is there already, and leave the folder."""
        if self._folder is None or self._plan is None:
            return
        with contextlib.suppress(OSError, LocalError):  # the disk may be full, or the folder another's by now
            if self._world.is_main:
                self._folder.check_owner()
            if self._folder.runs_in_this_attempt():
                with contextlib.suppress(OSError):
                    self._folder.write_summary(how_it_ends(state, reason, self.step, self._plan))
                self._folder.write_state(state)
            if self._world.is_main:
                self._folder.release()

    def record_on_main(self, state: State, reason: str) -> None:
        if self._world.is_main:
            self.record(state, reason)

    def record_error(self, error: Exception) -> None:
        """The rank that meets an error alone records it: the others only lose contact, later.

        Raises LocalError for what the user can mend.
        """
        silence_loaders()
        self._last_writes()
        if isinstance(error, UserError):
            (self.record if isinstance(error, LocalError) else self.record_on_main)("mistake", str(error))
        elif line := self._out_of_memory(error) or loader_fault(error):
            traceback.clear_frames(error.__traceback__)  # frees memory, and the descriptors that a file needs
            self.record("mistake", line)
            raise LocalError(line) from None
        elif line := lost_contact(error):
            self.record_on_main("fault", line)
        else:
            self.record("fault", nccl_fault(error) or f"{type(error).__name__}: {first_line(error)}")

    def _last_writes(self) -> None:
        """What was handed over before the error is whole: let it become a checkpoint."""
        if self._run is not None and self._world.is_main:
            with contextlib.suppress(Exception):  # the error that ends the run is the one to tell
                until = time.monotonic() + self._run.config.checkpoint.grace
                self._run.record.folder.writer.until = lambda: until
                self._run.record.folder.writer.finish()

    def _out_of_memory(self, error: Exception) -> str | None:
        """One line if that is what `error` says: what did not fit, and what to change."""
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: can't allocate" not in str(error):
            return None
        assert self._plan is not None, "nothing large before"
        size, batch = self._plan.micro_batch, self._plan.global_batch
        smaller = ", ".join([str(n) for n in range(size - 1, 0, -1) if batch % n == 0][:4])
        return (
            f"step {self.step}: out of memory with micro-batches of {size} samples. Smaller "
            f"ones that divide the batch ({smaller or 'there are none'}: --batch.micro_batch) need less, but make "
            "another model, since they are batch-norm's groups; engine.zero above 0 needs less and changes nothing"
        )
