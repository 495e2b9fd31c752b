"""`shards`: images to tars and their index, an index of tars that are there, and their verification."""

from collections.abc import Callable
from pathlib import Path

from dist_trainer.arguments import new_parser, parse
from dist_trainer.comm import cores
from dist_trainer.errors import UserError


def _pack(argv: list[str]) -> int:
    parser = new_parser(
        "shards pack", "Images to WebDataset tars and their index: OUT/train and OUT/val.", config=False
    )
    parser.add_argument(
        "source", type=str, help="a folder with train/ and val/ (or class folders), or torchvision/NAME"
    )
    parser.add_argument("out", type=str, help="a folder that will be made")
    parser.add_argument(
        "--root", type=str | None, default=None, help="where torchvision's files are, or are downloaded to"
    )
    parser.add_argument("--samples_per_shard", type=int, default=2048, help="samples per tar")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle over shards")
    values = parse(parser, argv)
    from rich.progress import track

    from dist_trainer.data.pack import find_splits, pack

    if values.samples_per_shard < 1:
        raise UserError(f"--samples_per_shard: {values.samples_per_shard} is not positive")
    for split, source in find_splits(values.source, Path(values.root) if values.root else None).items():
        out = Path(values.out) / split
        done = 0
        shards = pack(source, out, samples_per_shard=values.samples_per_shard, seed=values.seed, num_processes=cores())
        for samples in track(shards, f"packing {split}", total=-(-len(source) // values.samples_per_shard)):
            done += samples
        print(f"{out}: {done:,} samples, {len(source.class_names)} classes")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {"pack": _pack}
