"""Parameters without weight decay: normalisation layers, biases, and those that the model names itself."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

NoDecay = Literal["norm", "bias", "vector", "model"]

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """torch's normalisation layers and what derives from them, or a layer that is called so (timm's RmsNorm)."""
    if isinstance(module, NORM_LAYERS):
        return True
    name = type(module).__name__.lower()
    # Parameters of its own: torchvision's Conv2dNormActivation only holds a norm.
    return ("norm" in name or name == "inplaceabn") and any(True for _ in module.parameters(recurse=False))


def decaying_vectors(model: nn.Module, no_decay: Sequence[NoDecay]) -> list[str]:
    """Names of trained parameters of one dimension that decay, though not in timm: where others are kept off it."""
    if not {"norm", "bias"} <= set(no_decay):
        return []
    free = without_decay(model, no_decay)
    return [
        name for name, each in model.named_parameters() if each.requires_grad and each.dim() < 2 and name not in free
    ]


def without_decay(model: nn.Module, no_decay: Sequence[NoDecay]) -> set[str]:
    """Names of the parameters without weight decay.

    Told apart by the type of their module: a name test such as "bn" misses torchvision's `downsample.1`. A matrix
    inside a class that is only called norm decays. `model`: those that its no_weight_decay() names or matches, as
    timm's networks do for position embeddings and class tokens. `vector`: whatever has one dimension or none, such as
    LayerScale's gammas, as timm leaves them out.
    """
    names = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            last = name.rpartition(".")[2]
            in_norm = is_norm(module) and (isinstance(module, NORM_LAYERS) or parameter.dim() < 2)
            is_bias = last == "bias" or last.endswith("_bias")  # in_proj_bias of attention
            is_vector = "vector" in no_decay and parameter.dim() < 2
            if ("norm" in no_decay and in_norm) or ("bias" in no_decay and is_bias) or is_vector:
                names.add(name)
    if "model" in no_decay and hasattr(model, "no_weight_decay"):
        patterns: Collection[str] = model.no_weight_decay()  # type: ignore[operator]
        names |= {name for name, _ in model.named_parameters() if any(fnmatchcase(name, each) for each in patterns)}
    return names
