"""A config's model and validation set without an engine: weights go in, their exact accuracy comes out."""

from collections.abc import Sequence
from pathlib import Path

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.stream import EvalStream
from dist_trainer.distributed.collectives import read_on_main
from dist_trainer.distributed.world import World
from dist_trainer.engine.evaluate import EvalResult, center_crop, evaluate, report_bad
from dist_trainer.engine.inference import Inference, Preprocess
from dist_trainer.engine.numerics import set_numerics
from dist_trainer.log.console import Terminal
from dist_trainer.models import build_model
from dist_trainer.run.data import open_data
from dist_trainer.run_folder import checkpoint
from dist_trainer.tensors import State, sha256
from dist_trainer.tricks.freezing import freeze


class Evaluation:
    """`load` weights, then `score` them; repeat as needed."""

    def __init__(
        self, config: TrainConfig, world: World, terminal: Terminal, classes: tuple[str, Sequence[str]] | None = None
    ) -> None:
        """`classes`: a file, and the class names in it, that tells which outputs the weights have.

        Raises UserError for data that cannot be used (collective).
        """
        set_numerics(config.run.deterministic or config.engine.is_exact, config.engine.cpu_threads)
        self.data = open_data(config, world, terminal)
        if classes is not None:
            file, names = classes
            opened, self.data = self.data, self.data.for_outputs(names, file)
            if self.data is not opened:
                terminal.say(f"labels are numbered by name as in {file}, the classes of the weights")
        model = build_model(config.model, self.data.num_classes, config.run.seed)
        freeze(model, config.model.freeze)  # batch-norm is re-estimated where training moved it
        preprocess = Preprocess.of(config.data, config.model)
        self.inference = Inference(
            model.to(world.device), config.engine.precision, preprocess, world, config.engine.is_exact
        )
        if not config.engine.is_exact:  # weights as they were in training
            model.to(memory_format=preprocess.memory_format)
        self._config, self._terminal = config.eval, terminal
        self._stream = EvalStream(self.data.val, config.data, center_crop(config.eval), config.eval.batch, world)

    def load(self, weights: State, source: str) -> None:
        """Raises UserError, naming `source`, for weights that do not fit the model."""
        checkpoint.load_into(self.inference.module, weights, source)

    def score(self) -> EvalResult:
        """Of what was loaded (collective)."""
        result = evaluate(self.inference, self._stream)
        report_bad(self._config, self._stream.index, result, None, self._terminal)
        return result


def evaluate_weights(
    config: TrainConfig,
    weights: Path,
    world: World,
    terminal: Terminal,
    name: str = "model",
    classes: tuple[str, Sequence[str]] | None = None,
) -> tuple[EvalResult, str]:
    """Score `weights` (a safetensors file, or `name` of a checkpoint folder) on the validation set (collective).

    `classes`: of Evaluation. Returns their sha256 too (tensors.py).
    """
    state = read_on_main(world, lambda: checkpoint.load_weights(weights, name))
    evaluation = Evaluation(config, world, terminal, classes)
    evaluation.load(state, str(weights))
    return evaluation.score(), sha256(state)
