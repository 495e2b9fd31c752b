"""`shards`: images to tars and their index, an index of tars that are there, and their verification."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_trainer.arguments import new_parser, parse
from dist_trainer.comm import cores
from dist_trainer.errors import UserError


def _pack(argv: list[str]) -> int:
    parser = new_parser(
        "shards pack", "Images to WebDataset tars and their index: OUT/train and OUT/val.", config=False
    )

    def option(name: str, **settings: Any) -> None:
        parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **settings)

    parser.add_argument(
        "source",
        type=str,
        help="a folder with train/ and val/, or of class folders, or with ILSVRC2012_*.tar; or torchvision/NAME",
    )
    parser.add_argument("out", type=str, help="a folder that will be made")
    option(
        "labels", action="append", type=str, help="[SPLIT=]CSV of file name and class, of images without class folders"
    )
    option("val_fraction", type=float | None, default=None, help="share of each class that is split off for validation")
    option("root", type=str | None, default=None, help="where torchvision's files are, or are downloaded to")
    option("samples_per_shard", type=int, default=2048, help="samples per tar")
    option("seed", type=int, default=0, help="of the shuffle over shards, and of the split for validation")
    option("max_side", type=int | None, default=None, help="pixels: larger images become JPEGs with this longer side")
    option("quality", type=int | None, default=None, help="of those JPEGs (default: 95)")
    values = parse(parser, argv)
    if values.quality is not None and values.max_side is None:
        raise UserError("--quality: is that of images that --max_side makes smaller; others are taken as they are")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dist_trainer.data.pack import Recipe, pack, unfinished
    from dist_trainer.data.pack_splits import find_splits

    chosen = {name: values[name] for name in ("samples_per_shard", "seed", "max_side", "quality")}
    recipe = Recipe(**{name: value for name, value in chosen.items() if value is not None})
    with Console().status(f"listing {values.source}"):  # 100 s for the headers in ILSVRC2012_img_train.tar
        splits = find_splits(
            values.source,
            Path(values.root) if values.root else None,
            labels=values.labels or (),
            val_fraction=values.val_fraction,
            seed=values.seed,
        )
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    for split, source in unfinished(splits, Path(values.out), recipe).items():
        out = Path(values.out) / split
        with Progress(*columns, TimeRemainingColumn()) as bar:
            task = bar.add_task(f"packing {split}", total=len(source), rate="")
            for samples in pack(source, out, recipe, num_processes=cores(), say=print):
                bar.advance(task, samples)
                shown = bar.tasks[task]
                speed = shown.speed or shown.completed / (shown.elapsed or 1)
                bar.update(task, rate=f"{speed:,.0f} images/s")
        ignored = f", {source.num_ignored:,} other files ignored" if source.num_ignored else ""
        print(f"{out}: {len(source):,} samples, {len(source.class_names)} classes{ignored}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {"pack": _pack}
