"""`augment`: a picture of training images before and after augmentation, at several epochs of the run."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dist_trainer.config.arguments import new_parser, parse_config
from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.batch import EvalAddress
from dist_trainer.data.samples import EvalSamples, FixedTrainSamples, choose_samples
from dist_trainer.distributed.world import alone
from dist_trainer.engine.evaluate import center_crop
from dist_trainer.errors import UserError, plural
from dist_trainer.log.console import Terminal
from dist_trainer.run.blueprint import make_blueprint
from dist_trainer.run.data import open_data

_COLUMNS = 6
_MARGIN, _LINE = 4, 14


def command(argv: list[str]) -> int:
    parser = new_parser(
        "augment", "A PNG of training images before and after augmentation, at several epochs of the run."
    )
    parser.add_argument("--samples", type=int, default=8, help="training samples, one row each")
    parser.add_argument("--out", type=str, default="augment.png", help="the picture")
    config, values = parse_config(parser, argv)
    out = Path(values.out).expanduser()
    try:
        line = augment_grid(config, values.samples, out)
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {out}: {error}") from None
    print(line)
    return 0


def augment_grid(config: TrainConfig, num_samples: int, out: Path) -> str:
    """Write a PNG with a row per training sample: as evaluation prepares it, then as training does in several epochs,
    mixed if mixing is on. Returns a line on it. Raises UserError.
    """
    if num_samples < 1:
        raise UserError(f"--samples: {num_samples} is not positive")
    if config.data.source == "stream":
        raise UserError("augment: needs an index to draw from; data.source: stream has none")
    index = open_data(config, alone(), Terminal(active=False)).train
    num_samples = min(num_samples, len(index))
    blueprint = make_blueprint(config, index, index.num_classes, 1)
    ids = choose_samples(index, num_samples, config.run.seed)
    address = EvalAddress(0, num_samples)
    last = blueprint.augment.last_step
    steps = sorted({round(last * n / (_COLUMNS - 1)) for n in range(_COLUMNS)})
    before = EvalSamples(index, config.data, center_crop(config.eval), ids)[address]
    columns, titles = [before.images], ["evaluation"]
    for step in steps:
        batch = FixedTrainSamples(index, blueprint.augment, config.data, ids, step)[address]
        if batch.problem or before.problem:
            raise UserError(str(batch.problem or before.problem))
        mix = blueprint.mixing.draw(step, 0, batch.images.shape) if num_samples > 1 else None
        columns.append(batch.images if mix is None else mix.images(batch.images))
        mixed = mix is not None and mix.share < 1
        kind = "" if not mixed else (" CutMix" if mix.box else " Mixup")  # type: ignore[union-attr]
        titles.append(f"epoch {blueprint.augment.epoch(step)}{kind}")
    _draw(columns, titles, [index.class_names[label] for label in before.labels.tolist()]).save(out)
    return f"{out}: {plural(num_samples, 'sample')}, as evaluation prepares them and in {plural(len(steps), 'epoch')}"


def _draw(columns: list[torch.Tensor], titles: list[str], labels: list[str]) -> Image.Image:
    """A picture of uint8 [m, C, H, W] columns, each with its title, under each row its class."""
    zoom = max(1, 96 // max(max(column.shape[2:]) for column in columns))
    side = [zoom * max(column.shape[axis] for column in columns) for axis in (2, 3)]
    height, width = side[0] + _MARGIN + _LINE, max(side[1], 96) + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + width * len(columns), _LINE + height * len(labels)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, (column, title) in enumerate(zip(columns, titles, strict=True)):
        draw.text((_MARGIN + x * width, 1), title, "black")
        for y, image in enumerate(column):
            pixels = image.permute(1, 2, 0).numpy()
            picture = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
            picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
            sheet.paste(picture, (_MARGIN + x * width, _LINE + y * height))
    for y, label in enumerate(labels):
        draw.text((_MARGIN, _LINE + y * height + side[0]), label[:40], "black")
    return sheet
