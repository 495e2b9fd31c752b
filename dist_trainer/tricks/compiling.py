"""torch.compile of the training forward and its backward."""

from contextlib import AbstractContextManager

import torch
from torch import nn

from dist_trainer.errors import UserError


def compile_training(model: nn.Module, device: torch.device) -> None:
    """Compile `model` in place, at its first call; parameters and buffers keep their names.

    Each shape of images is compiled separately. Dropout draws the same numbers as without compilation, so the results
    differ only by rounding. Code is kept in TORCHINDUCTOR_CACHE_DIR (a folder per user in /tmp). Raises UserError if a
    small function cannot be compiled: usually because there is no C++ compiler.
    """
    try:
        torch.compile(_small)(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:  # torch.compile's errors are RuntimeErrors
        lines = [line for line in str(error).splitlines() if line and not line.startswith("backend=")]
        raise UserError(
            f"engine.compile: torch.compile does not work here: {lines[0] if lines else type(error).__name__}. "
            "Install a C++ compiler (Debian: g++), or set it to false"
        ) from None
    model.compile(dynamic=False, options={"fallback_random": True})


def allow_sizes(count: int) -> None:
    """Let torch compile a function for each of so many sizes of images.

    It would stop at the ninth, with a warning of its own, and the largest images of a growing crop go uncompiled.
    """
    import torch._dynamo

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * count)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 256 * count)


def compile_note(device: torch.device) -> str | None:
    """A line where compiled code is known to end processes."""
    if device.type != "cpu":
        return None
    return (
        "engine.compile: on a CPU torch's compiled backward may end the process without a word (seen with 2.14.1: "
        "pytorch issue 181689); it is meant for GPUs"
    )


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def uncompiled() -> AbstractContextManager[None]:
    """In this block a compiled model runs uncompiled.

    Evaluation needs it: compiled code ignores hooks that are set later (PreciseBN's), `eval` later scores the same
    bits, and the last, smaller batch of a set would be compiled separately.
    """
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
