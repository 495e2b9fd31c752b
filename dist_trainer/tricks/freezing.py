"""Freezing parts of a network for fine-tuning: their parameters and batch-norm statistics stay as they are."""

from collections.abc import Sequence

from torch import nn

from dist_trainer.errors import UserError, nearest
from dist_trainer.tricks.batch_norm import BatchNorm, keep_statistics


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Freeze the submodules and parameters of these names: `layer1` is all of layer1, and not layer10.

    Their batch-norm layers normalise with their running statistics, in training too. Raises UserError for a name that
    the model does not have, and if nothing is left to train.
    """

    def is_below(name: str) -> bool:
        return any(name == each or name.startswith(f"{each}.") for each in prefixes)

    modules = dict(model.named_modules())
    known = [name for name in (*modules, *dict(model.named_parameters())) if name]
    for each in prefixes:
        if each not in known:
            top = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"model.freeze: the model has no part {each!r}{nearest(each, known)}; it consists of {top}")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_below(name):
            parameter.requires_grad_(False)
    for name, module in modules.items():
        if is_below(name) and isinstance(module, BatchNorm):
            keep_statistics(module)
    if prefixes and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.freeze: {', '.join(prefixes)} leave no parameter to train")
