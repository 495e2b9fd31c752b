"""The whole config: composes what each room owns, and decides nothing itself."""

from dataclasses import asdict, dataclass, field
from typing import Any

from dist_trainer.data.augment import AugmentConfig
from dist_trainer.data.config import DataConfig
from dist_trainer.engine.base import EngineConfig
from dist_trainer.engine.evaluate import EvalConfig
from dist_trainer.log.tracker import LogConfig
from dist_trainer.log.wandb_run import WandbConfig
from dist_trainer.models import ModelConfig
from dist_trainer.plan import BatchConfig, DurationText
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
    duration: DurationText = "90ep"
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
