"""The whole config: composes what each room owns, and decides nothing itself."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from dist_trainer.data.augment import AugmentConfig
from dist_trainer.data.config import DataConfig
from dist_trainer.engine.base import EngineConfig
from dist_trainer.engine.evaluate import EvalConfig
from dist_trainer.errors import UserError, nearest
from dist_trainer.log.tracker import LogConfig
from dist_trainer.log.wandb_run import WandbConfig
from dist_trainer.models import ModelConfig
from dist_trainer.plan import BatchConfig
from dist_trainer.run_folder.checkpoint import CheckpointConfig
from dist_trainer.run_folder.folder import RunConfig
from dist_trainer.tricks.averaging import AveragingConfig
from dist_trainer.tricks.ema import EmaConfig
from dist_trainer.tricks.learning_rate import LearningRateConfig
from dist_trainer.tricks.losses import LossConfig
from dist_trainer.tricks.mixing import MixingConfig
from dist_trainer.tricks.optimizers import OptimizerConfig
from dist_trainer.tricks.precise_bn import PreciseBnConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    data: DataConfig
    run: RunConfig = field(default_factory=RunConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    duration: str = "90ep"
    """How long to train: 90ep, 450000step or 115200000sample."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr: LearningRateConfig = field(default_factory=LearningRateConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    precise_bn: PreciseBnConfig = field(default_factory=PreciseBnConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as YAML would hold them."""
        values: dict[str, Any] = plain(asdict(self))
        return values


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def _dataclasses_in(hint: Any) -> list[type]:
    """The dataclasses that a type such as `CropConfig | None` or `list[Named]` may hold."""
    if is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return [found for part in get_args(hint) for found in _dataclasses_in(part)]


def _keys(cls: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(cls)
    for each in fields(cls):
        yield prefix + each.name
        for inner in _dataclasses_in(hints[each.name]):
            yield from _keys(inner, f"{prefix}{each.name}.")


def check_keys(values: Mapping[str, Any], cls: type = TrainConfig, prefix: str = "") -> None:
    """Raises UserError for the first key that does not exist, with the nearest that does.

    The parser would pass over some (`agrs: {}`) and name others without their place.
    """
    hints = get_type_hints(cls)
    for key, value in values.items():
        if not isinstance(key, str):
            raise UserError(f"{prefix}{key}: a key must be a word")
        if key not in hints:
            name, inside = prefix + key, value
            while isinstance(inside, Mapping) and len(inside) == 1:  # --btch.global_batch is meant as a whole
                ((inner_key, inside),) = inside.items()
                name += f".{inner_key}"
            raise UserError(f"{name}: no such key{nearest(name, _keys(cls, prefix))}")
        for inner in _dataclasses_in(hints[key]):
            if hints[key] is inner and not isinstance(value, Mapping):
                raise UserError(f"{prefix}{key}: {value!r} where keys belong: {', '.join(get_type_hints(inner))}")
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Mapping):
                    check_keys(item, inner, f"{prefix}{key}.")
