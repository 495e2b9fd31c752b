"""`agent`: torchrun, with its arguments, that ends as its ranks do and prints no report.

Ranks have said already what went wrong; torchrun's 25 lines would hide it.
"""

import os
import tempfile
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dist_trainer.distributed.processes import STATUS_FILE
from dist_trainer.errors import EXIT_STATUS, UserError, first_line


def command(argv: list[str]) -> int:
    """Raises UserError for an argument that torchrun does not take."""
    status = "done"
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "status"
        os.environ[STATUS_FILE] = str(said)
        try:
            torchrun.run(torchrun.parse_args(argv))  # type: ignore[no-untyped-call]
        except ValueError as error:  # of an argument
            raise UserError(f"agent: {first_line(error)}") from None
        except ChildFailedError:  # one that said nothing was killed
            status = "fault"
        except SignalException:  # those that said nothing had not begun
            status = "interrupted"
        return first_of_last_attempt(said.read_text() if said.exists() else "", EXIT_STATUS[status])


def first_of_last_attempt(said: str, otherwise: int) -> int:
    """Of lines `attempt status`: one rank's end is the cause of those after it. `otherwise`: where there is no line."""
    lines = [(int(attempt), int(status)) for attempt, status in map(str.split, said.splitlines())]
    last = max((attempt for attempt, _ in lines), default=0)
    return next((status for attempt, status in lines if attempt == last), otherwise)
