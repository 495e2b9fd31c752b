"""Which kernels torch may choose: the fast ones, or those that give the same bits each time."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from dist_trainer.errors import UserError


def set_numerics(deterministic: bool, threads: int | None = None) -> None:
    """Call it before anything runs on a device. `threads`: of the CPU; None leaves them to the environment.

    Unless `deterministic`, cuDNN measures which algorithm is fastest for a shape, so two runs may use different ones.
    float32 is float32 in convolutions as in matrix products, not TensorFloat-32, which keeps 10 of 23 bits:
    `engine.precision: bf16` is the fast one.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    # A pass over new memory that finds bugs, and mends none.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if threads is not None:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts


def precision_note(precision: str, device: torch.device) -> str | None:
    """A line where bf16 is asked of a GPU that only emulates it, more slowly than float32."""
    if precision != "bf16" or device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    name = torch.cuda.get_device_name(device)
    return f"engine.precision: {name} has no bf16 and emulates it: fp32 is faster there"


@contextlib.contextmanager
def naming_operations() -> Iterator[None]:
    """Turns torch's refusal of an operation that has no deterministic kernel into a UserError that names it."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if not found:
            raise
        raise UserError(
            f"run.deterministic: {found[1]} has no deterministic implementation on this device; "
            "set it to false, or choose a model, loss or transform without it"
        ) from None
