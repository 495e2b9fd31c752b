"""Names of weights in other programs' files, bound to the model's: prefixes that those programs add are taken off."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

PREFIXES = (
    "module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "base_encoder.", "encoder_q.", "head.",
    "ema_model.", "ema.", "teacher.", "student.",
)  # fmt: skip
"""Of DistributedDataParallel, AveragedModel, torch.compile, Lightning, mmpretrain, MoCo, DINO, super-gradients. Where a
file has the same weights behind several, those that come first here win, and an average wins over what it is of."""
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema_net", "teacher", "state_dict", "model", "net", "student",
)  # fmt: skip
"""Keys under which training programs keep weights, in the order in which they are tried: averages first, as by timm."""


def bound(weights: Mapping[str, Any], own: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """(`weights` by names of the model where they have one, the prefixes that were taken off).

    Of several entries for one name that behind the most frequent prefix is taken, the others keep their names.
    """
    found = {key: _split(key, own) for key in weights}
    counts = Counter(prefix for prefix, name in found.values() if name in own)
    by_frequency = [prefix for prefix, _ in counts.most_common()]
    keys: dict[str, str] = {}  # the entry of each name
    for prefix in by_frequency:
        for key, (its, name) in found.items():
            if its == prefix and name in own:
                keys.setdefault(name, key)
    taken = {key: name for name, key in keys.items()}
    named = {taken.get(key, key if name in own else name): weights[key] for key, (_, name) in found.items()}
    return named, sorted({found[key][0] for key in taken} - {""})


def _split(key: str, own: Collection[str]) -> tuple[str, str]:
    """(the prefix, the name behind it) if the model has that name; else what is left when all are taken off."""
    name = key
    while name not in own:
        prefix = next((each for each in PREFIXES if name.startswith(each)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    return key.removesuffix(name), name
