"""Layer-wise learning rates for fine-tuning: the head learns at the full rate, each layer below it more slowly.

Clark et al. 2020, "ELECTRA", appendix A; BEiT and timm's param_groups_layer_decay group a network's layers likewise.
"""

from collections.abc import Iterator

from torch import nn

from dist_trainer.tricks.no_decay import is_norm

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """The factor on each parameter's learning rate: layer_decay ** (its distance from the head in layers)."""
    layers = layers_of(model)
    head = max(layers.values(), default=0)
    return {name: layer_decay ** (head - layer) for name, layer in layers.items()}


def layers_of(model: nn.Module) -> dict[str, int]:
    """The layer of every parameter, 0 for the stem: timm's own grouping where the model has one."""
    if hasattr(model, "group_matcher"):
        from timm.models import group_parameters

        matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
        found: dict[str, int] = group_parameters(model, matcher, reverse=True)
        return found
    return layers_by_structure(model)


def layers_by_structure(model: nn.Module) -> dict[str, int]:
    """The layer of every parameter, in the order in which the network registers its parts.

    Blocks are the members of plain containers (torchvision's `layer1`, `features`, which may be nested), unless they
    are single convolutions or the like. Everything before the first block is the stem, the last part is the head. A
    normalisation layer belongs to the layer before it. Parameters outside any part (class tokens, position embeddings)
    belong to the stem. Anything else is a layer by itself.
    """
    trunk = model
    while len(parts := _children(trunk)) == 1:  # a network inside a wrapper
        trunk = parts[0]
    half = sum(p.numel() for p in trunk.parameters()) / 2
    body = [found for part in parts[:-1] for found in _blocks(part, type(trunk) in CONTAINERS, half)]
    has_blocks = any(is_block for _, is_block in body)
    layers: list[set[nn.Parameter]] = [set()]
    for part, is_block in body:
        in_stem = has_blocks and not is_block and len(layers) == 1
        if not (in_stem or is_norm(part)):
            layers.append(set())
        layers[-1] |= set(part.parameters())
    layers += [set(part.parameters()) for part in parts[-1:]]
    first = 0 if layers[0] else 1  # a network that begins with a block has no other stem
    depth = {parameter: number for number, layer in enumerate(layers[first:]) for parameter in layer}
    return {name: depth.get(parameter, 0) for name, parameter in model.named_parameters()}


def _children(module: nn.Module) -> list[nn.Module]:
    """Those with parameters."""
    return [child for child in module.children() if any(True for _ in child.parameters())]


def _blocks(part: nn.Module, in_container: bool, half: float) -> Iterator[tuple[nn.Module, bool]]:
    """A part and whether it is a block, or those of a container, or of what holds more than half of the network."""
    is_container = type(part) in CONTAINERS  # by exact type: torchvision derives blocks from Sequential
    children = _children(part)
    if is_container or (children and not in_container and sum(p.numel() for p in part.parameters()) > half):
        for child in children:
            yield from _blocks(child, is_container, half)
    else:
        yield part, in_container and bool(children)
