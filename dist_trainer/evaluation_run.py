"""`eval`: the exact accuracy of given weights."""

from pathlib import Path

from dist_trainer import checkpoint
from dist_trainer.comm import World, on_main
from dist_trainer.config import TrainConfig
from dist_trainer.data.stream import EvalStream
from dist_trainer.evaluate import EvalResult, center_crop, evaluate, report_bad
from dist_trainer.inference import Inference, Preprocess
from dist_trainer.log.console import Terminal
from dist_trainer.models import build_model
from dist_trainer.run import open_data, prepare_data


def evaluate_weights(config: TrainConfig, weights: Path, world: World, terminal: Terminal) -> EvalResult:
    """Score `weights` (a checkpoint folder or a safetensors file) on the config's validation set (collective)."""
    place = on_main(world, lambda: prepare_data(config))
    for note in place["notes"]:
        terminal.say(note)
    train_index, val_index = open_data(config, place)
    model = build_model(config.model, train_index.num_classes, config.run.seed)
    checkpoint.load_into(model, checkpoint.load_weights(weights), str(weights))
    preprocess = Preprocess(mean=config.data.mean, std=config.data.std, channels_last=config.model.channels_last)
    inference = Inference(model.to(world.device), config.engine.precision, preprocess, world)
    model.to(memory_format=preprocess.memory_format)
    stream = EvalStream(val_index, config.data, center_crop(config.eval), config.eval.batch, world)
    result = evaluate(inference, stream)
    report_bad(config.eval, val_index, result, None, terminal)
    return result
