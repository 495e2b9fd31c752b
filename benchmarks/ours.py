"""dist_trainer's loader for the benchmarks: batches in this process, without ranks or loader workers."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from dist_trainer.data.augment import Augment, AugmentConfig, CropConfig
from dist_trainer.data.batch import SlotAddress
from dist_trainer.data.config import DataConfig
from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.data.order import OrderSpec
from dist_trainer.data.samples import TrainSamples
from dist_trainer.distributed.world import alone
from dist_trainer.engine.inference import Inference, Preprocess
from dist_trainer.plan import BatchConfig, Duration, Plan, make_plan

SIZE, MEAN, STD = 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
ALONE = alone()


def plan_of(samples: int, batch: int, micro_batch: int, world: int = 1) -> Plan:
    config = BatchConfig(global_batch=batch, micro_batch=micro_batch)
    return make_plan(config, Duration.parse("1000ep", "duration"), world=world, num_samples=samples)


def augment_of(config: AugmentConfig, plan: Plan) -> Augment:
    return Augment(config, 0, plan, MEAN)


def train_samples(index: ShardIndex, plan: Plan, augment: AugmentConfig | None = None) -> TrainSamples:
    spec = OrderSpec(seed=0, lanes=plan.samples_per_step // plan.chunk, chunk=plan.chunk)
    augment = augment or AugmentConfig(crop=CropConfig(size=SIZE))
    return TrainSamples(index, plan, spec, augment_of(augment, plan), DataConfig(train="", val=""))


def photograph_samples(folder: Path, batch: int) -> TrainSamples:
    index = ShardIndex.load(folder / "packed/train" / FILE_NAME)
    return train_samples(index, plan_of(len(index), batch, batch))


def uint8(folder: Path, batch: int) -> Iterator[torch.Tensor]:
    """Batches as they go to a device, which normalises them."""
    samples, step = photograph_samples(folder, batch), 0
    while True:
        yield samples[SlotAddress(step, 0)].images
        step += 1


def float32(folder: Path, batch: int) -> Iterator[torch.Tensor]:
    """Batches normalised here, as training on a CPU does it."""
    preprocess = Preprocess(mean=MEAN, std=STD, channels_last=True)
    inference = Inference(nn.Identity(), "fp32", preprocess, ALONE)
    yield from map(inference.logits, uint8(folder, batch))  # of the identity: the prepared images


OURS = {"uint8": uint8, "float32": float32}
