"""Validation images with what the best weights say of them: as they are, and where they are most surely wrong."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.batch import Batch, EvalAddress
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.samples import EvalSamples
from dist_trainer.draws import permute
from dist_trainer.engine.evaluate import center_crop
from dist_trainer.errors import UserError, first_line
from dist_trainer.run.state import Run
from dist_trainer.run_folder import checkpoint
from dist_trainer.tensors import State

SIDE, LINE, MARGIN = 96, 12, 6
"""Of a picture, a line of text, and the space between pictures, in pixels."""
NUM_DRAWN = 16
"""Of each kind."""


def best_predictions(folder: Path) -> State | None:
    """label, predicted (int32 [N]; -1: a bad sample) and confidence (float32 [N]) of a run's best weights, if any."""
    for best in checkpoint.complete(folder / "best"):
        if "predictions" in checkpoint.tensor_names(best):
            return checkpoint.load_tensors(best, "predictions")
    return None


def surely_wrong(said: State, count: int) -> list[int]:
    """Numbers of the wrong samples with the highest confidence, the surest first."""
    wrong = (said["predicted"] != said["label"]) & (said["predicted"] >= 0) & (said["label"] >= 0)
    order = torch.where(wrong, said["confidence"], -1.0).argsort(descending=True, stable=True)
    return [int(sample) for sample in order[: min(count, int(wrong.sum()))]]


def pictures(config: TrainConfig, index: ShardIndex, ids: list[int]) -> list[Image.Image]:
    """These validation samples as evaluation prepares them, SIDE pixels high, in the order of `ids`.

    Raises UserError for storage that cannot be reached. A bad sample is black.
    """
    samples = EvalSamples(index, config.data, center_crop(config.eval), np.asarray(ids))
    drawn = []
    for number in range(len(ids)):  # one by one: without eval.crop their sizes differ
        batch: Batch = samples[EvalAddress(number, 1)]
        if batch.outage or batch.problem:
            raise UserError(batch.outage or batch.problem or "")
        pixels = batch.images[0].permute(1, 2, 0).numpy()
        picture = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
        width = max(1, round(picture.width * SIDE / picture.height))
        small = picture.height < SIDE
        drawn.append(picture.resize((width, SIDE), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS))
    return drawn


def captions(index: ShardIndex, said: State, ids: list[int]) -> list[tuple[str, str]]:
    """(the class, what was predicted and how surely) of each."""
    names = index.class_names
    return [
        (
            names[int(said["label"][each])] if said["label"][each] >= 0 else "no label",
            f"{names[int(said['predicted'][each])]} {said['confidence'][each]:.0%}"
            if said["predicted"][each] >= 0
            else "not read",
        )
        for each in ids
    ]


def draw_predictions(run: Run) -> None:
    """predictions.png in the run folder, on one rank: two rows of samples drawn at random, two of the surest mistakes.

    What goes wrong here costs the picture, with a line, and nothing else.
    """
    said, index, terminal = best_predictions(run.record.folder.path), run.streams.val.index, run.record.tracker.terminal
    if said is None or len(said["label"]) != len(index):
        return
    drawn = permute(np.arange(min(NUM_DRAWN, len(index))), len(index), np.uint64(0))
    ids = [int(each) for each in drawn] + surely_wrong(said, NUM_DRAWN)
    try:
        grid(pictures(run.config, index, ids), captions(index, said, ids)).save(
            run.record.folder.path / "predictions.png"
        )
    except Exception as error:  # whatever it is: a picture must not cost a run that is done
        terminal.say(f"warning: predictions.png was not drawn: {first_line(error)}")


def grid(images: list[Image.Image], texts: list[tuple[str, str]], columns: int = 8) -> Image.Image:
    """Pictures in rows, below each its two lines; a wrong one's second line is red."""
    width = max(SIDE, *(image.width for image in images)) + MARGIN
    height = SIDE + 2 * LINE + MARGIN
    sheet = Image.new("RGB", (MARGIN + width * columns, MARGIN + height * -(-len(images) // columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, (label, said)) in enumerate(zip(images, texts, strict=True)):
        x, y = MARGIN + number % columns * width, MARGIN + number // columns * height
        sheet.paste(image, (x, y))
        draw.text((x, y + SIDE), label[:16], "black")
        draw.text((x, y + SIDE + LINE), said[-18:], "black" if said.rpartition(" ")[0] == label else "#b00020")
    return sheet
