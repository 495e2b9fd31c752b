"""Initial weights: read from a file of any kind, matched by name, with a report of everything that did not fit.

Nothing in a file is ever executed: safetensors, or torch's format with `weights_only`. Besides torch's own list only
argparse.Namespace is allowed, in which timm's checkpoints keep their arguments, and NumPy's numbers and arrays, in
which some programs keep their accuracy.
"""

import argparse
import codecs
import hashlib
import io
import math
import pickle
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from dist_trainer.distributed.collectives import broadcast_tensors, on_main
from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError, plural, some
from dist_trainer.models import ModelConfig
from dist_trainer.models.match_names import WRAPPERS, bound
from dist_trainer.models.published import Published, chosen, fetch, tags_of
from dist_trainer.run_folder import checkpoint, class_list
from dist_trainer.run_folder.fetch import local_weights
from dist_trainer.storage.storage import Storage, is_remote
from dist_trainer.tensors import State

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Report on loading pretrained weights. Names are the model's where it has them, otherwise the file's."""

    source: str
    sha256: str
    """The file's; "" if a library fetched it."""
    num_tensors: int
    """The model's tensors; `loaded` of them were loaded, which are `share` of its parameters."""
    loaded: int
    share: float
    dropped: list[str]
    """The classifier's tensors, if their shape or their classes differ."""
    missing: list[str]
    """The model's tensors that are not in the file: they keep their random values."""
    unexpected: list[str]
    """Entries of the file that the model does not have."""
    stripped: list[str] = field(default_factory=list)
    """Prefixes of other programs that were taken off the file's names."""

    def lines(self) -> list[str]:
        """For the user: a summary, then a line for each name, up to a few of a kind."""
        without = f", without {', '.join(self.stripped)}" if self.stripped else ""
        lines = [
            f"pretrained: {self.loaded} of {self.num_tensors} tensors, {self.share:.1%} of the parameters, "
            f"from {self.source}{without}"
        ]
        for kind in ("dropped", "missing", "unexpected"):
            names = getattr(self, kind)
            lines += [f"  {kind}: {name}" for name in names[:_SHOWN]]
            if len(names) > _SHOWN:
                lines.append(f"  {kind}: {len(names) - _SHOWN} more")
        return lines


def load_pretrained(
    config: ModelConfig,
    storage: Storage,
    model: nn.Module,
    world: World,
    has_same_outputs: Callable[[str, Sequence[str]], bool] = lambda file, names: True,
) -> LoadReport:
    """Load the weights that `config.pretrained` names into `model` (collective).

    Rank 0 reads or fetches them and sends them to the others. Those of a run have class names, in a file: where
    `has_same_outputs` says that they are not the model's, its classifier is left out. Raises UserError for what cannot
    be loaded.
    """

    def load() -> dict[str, Any]:
        found = find_pretrained(config, storage)
        if isinstance(found, Published):
            return asdict(fit(model, fetch(found, config.args), str(found)))
        weights, source, sha256 = read_weights(found, storage)
        classes = class_list.beside(found, storage)
        with_classifier = classes is None or has_same_outputs(*classes)
        return asdict(fit(model, weights, source, sha256, with_classifier=with_classifier))

    loaded = LoadReport(**on_main(world, load))
    broadcast_tensors(world, model.state_dict().values())
    return loaded


_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".pkl", ".ckpt")


def find_pretrained(config: ModelConfig, storage: Storage) -> Published | str:
    """The published weights, or the location of a file or folder, that `config.pretrained` names.

    Raises UserError if there is nothing, without reading it.
    """
    published = chosen(config)
    if published is not None:
        return published
    location = str(config.pretrained)
    try:
        storage.stat(location)
    except FileNotFoundError:
        tags = tags_of(config)
        known = f"; {config.name} has published weights {', '.join(tags)}" if tags and "/" not in location else ""
        raise UserError(f"model.pretrained: {location}: no such file{known}") from None
    except OSError as error:
        raise UserError(f"model.pretrained: {location}: cannot be read: {error.strerror or error}") from None
    return location


def read_weights(location: str, storage: Storage) -> tuple[Mapping[str, Any], str, str]:
    """(weights by name, where they were found, SHA-256 of the file) of a file, a URL, a checkpoint or a run folder.

    Raises UserError for what cannot be read or must not be unpickled.
    """
    path = location
    if is_remote(location) and not location.endswith(_ENDINGS):  # a run or a checkpoint
        path = str(_file_in(local_weights(location, storage)))
    elif not is_remote(location) and Path(location).is_dir():
        path = location = str(_file_in(Path(location)))
    try:
        with storage.open(path) as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"model.pretrained: {location}: cannot be read: {error.strerror or error}") from None
    weights, wrapper = unwrap(_parse(data, location), location)
    return weights, f"{location} ({wrapper})" if wrapper else location, hashlib.sha256(data).hexdigest()


def _file_in(folder: Path) -> Path:
    """The weights of a checkpoint folder; of a run folder the best, or else the newest ones. Raises UserError."""
    for root in (folder / "best", folder / "checkpoints"):
        found, _ = checkpoint.newest(root)
        if found is not None:
            return found / "model.safetensors"
    reason = checkpoint.fault(folder)
    if reason is not None:
        raise UserError(
            f"model.pretrained: {folder}: neither a run folder with checkpoints nor a checkpoint ({reason})"
        )
    return folder / "model.safetensors"


def _parse(data: bytes, location: str) -> Any:
    """The content of a file of either format, whatever its name."""
    if data[8:9] == b"{":
        try:
            return safetensors.torch.load(data)
        except SafetensorError as error:
            raise UserError(f"model.pretrained: {location}: not a whole safetensors file ({error})") from None
    if not data.startswith((b"PK\x03\x04", b"\x80")):
        raise UserError(f"model.pretrained: {location}: neither a safetensors nor a torch file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_numpys()]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        what = match[1] if match else "more than tensors and plain values"
        raise UserError(
            f"model.pretrained: {location}: refused: it holds {what}, and unpickling that could run any code; if you "
            "trust it, load it in Python and save its state_dict alone"
        ) from None
    except Exception as error:  # zipfile's, struct's and torch's own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.pretrained: {location}: not a whole torch file ({reason})") from None


def _numpys() -> list[Any]:
    """What a pickle of a NumPy number or array names. Neither runs code; NumPy 1 called their module otherwise."""
    core = np._core.multiarray  # type: ignore[attr-defined]
    made = [(each, f"numpy.{name}.multiarray.{each.__name__}") for name in ("core", "_core") for each in
            (core.scalar, core._reconstruct)]  # fmt: skip
    kinds = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"]
    return [*made, np.dtype, np.ndarray, *kinds, (codecs.encode, "_codecs.encode")]


def unwrap(content: Any, location: str) -> tuple[Mapping[str, Any], str]:
    """(weights by name, the key of a training program's checkpoint that they were under, or ""). Raises UserError."""
    taken: list[str] = []
    while isinstance(content, Mapping):
        inner = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content, taken = content[inner], [*taken, inner]
    if not isinstance(content, Mapping) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        what = (
            f"the keys {', '.join(map(str, list(content)[:4]))}"
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise UserError(f"model.pretrained: {location}: it holds no weights, but {what}")
    return content, ".".join(taken)


def classifiers_of(model: nn.Module) -> list[str]:
    """Names of the layers that compute the logits: timm's own list, or else the last linear layer.

    A convolution of 1x1 is linear too: SqueezeNet ends with one.
    """
    known = getattr(model, "pretrained_cfg", None) or {}
    names = known.get("classifier") if isinstance(known, Mapping) else None
    if names:
        return [names] if isinstance(names, str) else list(names)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    return linear[-1:]


def fit(
    model: nn.Module, weights: Mapping[str, Any], source: str, sha256: str = "", *, with_classifier: bool = True
) -> LoadReport:
    """Load every tensor whose name and shape are in `model`. A classifier of another shape is left out completely, as
    is one that is not wanted.

    Raises UserError, and loads nothing, if another shape differs or no name matches.
    """
    own = model.state_dict()
    named, stripped = bound(weights, own)
    matched: dict[str, torch.Tensor] = {}
    dropped: list[str] = []
    wrong: list[str] = []
    hint = ""
    classifiers = classifiers_of(model)
    for name, old in own.items():
        value = named.get(name)
        if not isinstance(value, torch.Tensor):
            continue
        is_classifier = name.rpartition(".")[0] in classifiers
        if is_classifier and not with_classifier and value.shape == old.shape:
            dropped.append(f"{name} of other classes")
            continue
        if value.shape == old.shape:
            matched[name] = value
            continue
        (dropped if is_classifier else wrong).append(f"{name} {list(value.shape)} for {list(old.shape)}")
        if value.shape[1:2] == (3,) and old.shape[1:2] == (1,):
            hint = "; data.channels: 3 reads grey images as RGB"
    if wrong:
        raise UserError(
            f"model.pretrained: {source}: other shapes than the model's: {some(wrong)}; "
            f"check model.name and model.args{hint}"
        )
    heads = {each.partition(" ")[0].rpartition(".")[0] for each in dropped}
    dropped += [name for name in matched if name.rpartition(".")[0] in heads]  # as a whole, or not
    matched = {name: value for name, value in matched.items() if name not in dropped}
    if not matched:
        raise UserError(
            f"model.pretrained: {source}: none of its names is one of the model's: it has {some(weights)}, and the "
            f"model {some(own)}; check model.name"
        )
    _check_fit(model, matched, heads, named, source)
    model.load_state_dict(matched, strict=False)
    return LoadReport(
        source=source,
        sha256=sha256,
        num_tensors=len(own),
        loaded=len(matched),
        share=_size(model, matched) / _size(model, own),
        dropped=dropped,
        missing=[name for name in own if name not in matched and name.rpartition(".")[0] not in heads],
        stripped=stripped,
        unexpected=sorted(name for name, value in named.items() if name not in own or not torch.is_tensor(value)),
    )


def _size(model: nn.Module, names: Collection[str]) -> int:
    """The number of values of the parameters with these names."""
    return sum(each.numel() for name, each in model.named_parameters() if name in names)


def _check_fit(model: nn.Module, matched: State, heads: Collection[str], named: Mapping[str, Any], source: str) -> None:
    """Raises UserError where fewer than half of the parameters are matched, not counting `heads` that were dropped, and
    for values that are not finite."""
    own = model.state_dict()
    if 2 * _size(model, matched) < _size(model, {name for name in own if name.rpartition(".")[0] not in heads}):
        missing = [name for name in own if name not in matched]
        raise UserError(
            f"model.pretrained: {source}: {len(matched)} of {len(own)} tensors, "
            f"{_size(model, matched) / _size(model, own):.1%} of the parameters, have a name that the model has; "
            f"missing are {some(missing)}, and it has {some(named.keys() - own.keys())}; check model.name"
        )
    if broken := [name for name, value in matched.items() if not bool(torch.isfinite(value).all())]:
        raise UserError(
            f"model.pretrained: {source}: {plural(len(broken), 'tensor')} with values that are not finite: "
            f"{some(broken)}"
        )


def advised_rate(num_samples: int) -> float:
    """The rate per 256 samples at which PaddleClas's guide ("Improve the accuracy of your own data set with existing
    pre-trained models") begins: .001 below 1,000 training images, .01 or more above 100,000.

    Between these it says nothing; here the logarithm of the rate is interpolated in the logarithm of their number.
    """
    return 1e-3 * math.sqrt(min(max(num_samples, 1_000), 100_000) / 1_000)
