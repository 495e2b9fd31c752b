"""`eval --pretrained`: published weights on the user's validation set, beside their published accuracy.

Are the labels right? A wrong class order gives chance, wrong preprocessing a few percent less.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

from dist_trainer.commands.ranks import ranks
from dist_trainer.config.arguments import Parser, parse_config, value_of
from dist_trainer.config.tree import TrainConfig
from dist_trainer.distributed.collectives import on_main
from dist_trainer.distributed.world import World
from dist_trainer.engine.evaluate import EvalResult
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.models.pretrained import load_pretrained
from dist_trainer.models.published import Published, chosen, tags_of
from dist_trainer.run.evaluation import Evaluation
from dist_trainer.run_folder import class_list
from dist_trainer.storage.storage import Storage

# The weights' own preprocessing and precision override a config.
_OWN = ["--data.preprocess=model", "--data.mean=[]", "--data.std=[]", "--data.channels=3", "--eval.resize=null",
        "--eval.crop=null", "--eval.interpolation=auto", "--model.args={}", "--engine.precision=fp32"]  # fmt: skip
_SLACK = 0.005  # between decoders, resizers and precisions; 0.001 or 0.002 are seen
_WNID = re.compile(r"n\d{8}")


def eval_published(parser: Parser, name: str, argv: list[str]) -> int:
    """The command, for --pretrained `name`."""
    ends = [k + 2 if word == "--config" else k + 1 for k, word in enumerate(argv) if re.match(r"--config(=|$)", word)]
    after_configs = max(ends + [1 for word in argv[:1] if not word.startswith("-")], default=0)
    if not after_configs:  # there is nothing to train
        argv = [f"--data.train={value_of(argv, 'data.val') or ''}", *argv]
    config, values = parse_config(parser, [*argv[:after_configs], *shorthand(name), *argv[after_configs:]])
    with ranks() as (world, terminal):
        for line in compare(config, values.weights, world, terminal).lines():
            terminal.say(line)
    return 0


def shorthand(name: str) -> list[str]:
    """Arguments that `--pretrained name` stands for: timm/MODEL or torchvision/MODEL, with or without .TAG."""
    library, _, rest = name.partition("/")
    model, _, tag = rest.partition(".")
    if library not in ("timm", "torchvision") or not model:
        raise UserError(
            f"--pretrained: {name!r}: say timm/MODEL or torchvision/MODEL, with tag torchvision/resnet50.IMAGENET1K_V1"
        )
    return [*_OWN, f"--model.name={library}/{model}", f"--model.pretrained={tag or 'true'}"]


@dataclass(frozen=True)
class Comparison:
    """`result` of `weights` on a validation set, whose class names are `class_names`."""

    weights: Published
    source: str
    result: EvalResult
    class_names: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the user: the measured accuracy, the published one, and the verdict."""
        ours, n = self.result.metrics, self.result.num_samples
        lines = [
            f"{self.source}: top-1 {ours['top1']:.2%} ({self.result.correct1}/{n})  "
            f"top-5 {ours['top5']:.2%}  loss {ours['loss']:.4f}"
        ]
        published = self.weights.top1
        if published is None:
            lines.append(
                f"published: {self.weights.library}'s package has no table of accuracies; its repository has one "
                "(results/results-imagenet.csv)"
            )
        else:
            lines.append(f"published: top-1 {published:.2%} on ImageNet-1k; difference {ours['top1'] - published:+.2%}")
        return [*lines, verdict(ours["top1"], published, n, self.weights.num_classes), *order_notes(self.class_names)]


def verdict(ours: float, published: float | None, num_samples: int, num_classes: int) -> str:
    """What top-1 `ours` on `num_samples` samples says about their labels, given `published` on ImageNet's 50,000."""
    chance = 1 / num_classes
    noise = 3 * sqrt(max(ours * (1 - ours), chance) / num_samples)
    if ours <= 5 * chance + noise and (published is None or published > 10 * chance + noise):
        return (
            f"verdict: as good as chance ({chance:.1%}): the labels are wrong, most likely numbered in another "
            "order than that of sorted WordNet ids"
        )
    if published is None:
        return "verdict: far better than chance, so the order of the labels is right"
    low, high = published - noise - _SLACK, published + noise + _SLACK
    if ours < low:
        return (
            "verdict: below the published accuracy, by more than the number of samples explains: some labels are "
            "wrong, or the images were changed (packed too small, or cropped)"
        )
    if ours > high:
        return "verdict: above the published accuracy: an easier set, or one that the model was trained on"
    return "verdict: as published: labels and preprocessing are right"


def order_notes(names: Sequence[str]) -> list[str]:
    """A line if the class names do not show the order of sorted WordNet ids, which the weights need."""
    if all(_WNID.fullmatch(name) for name in names):
        if list(names) == sorted(names):
            return []
        return ["warning: the class names are WordNet ids, and not sorted: the order of the labels is wrong"]
    what = "have no names" if all(name == str(number) for number, name in enumerate(names)) else "are no WordNet ids"
    return [f"the classes {what} ({names[0]}, ...), so their order cannot be compared with the weights'"]


def compare(config: TrainConfig, weights: str | None, world: World, terminal: Terminal) -> Comparison:
    """Score the published weights that `config` names, or a file of the same model, on data.val (collective).

    Raises UserError for what cannot be scored, such as another number of classes.
    """
    published = chosen(config.model)
    if published is None:
        known = ", ".join(tags_of(config.model)) or "none"
        raise UserError(f"--pretrained: {config.model.name} has no weights {config.model.pretrained!r}, but {known}")
    model = replace(config.model, pretrained=weights) if weights is not None else config.model
    storage = Storage(config.data.storage_options, config.data.retry)
    classes = on_main(world, lambda: class_list.beside(weights, storage) if weights is not None else None)
    evaluation = Evaluation(config, world, terminal, classes)
    index = evaluation.data.val
    if index.num_classes != published.num_classes:
        raise UserError(
            f"data.val: has {index.num_classes:,} classes, and {published} knows {published.num_classes:,}: its "
            "logits are for other classes; fine-tune it instead, with model.pretrained"
        )
    loaded = load_pretrained(model, storage, evaluation.inference.module, world)
    if loaded.dropped or loaded.missing:
        lacking = [*loaded.dropped, *loaded.missing]
        raise UserError(
            f"{loaded.source}: lacks {len(lacking)} of the model's tensors ({lacking[0]}, ...): it cannot be scored"
        )
    return Comparison(published, loaded.source, evaluation.score(), index.class_names)
