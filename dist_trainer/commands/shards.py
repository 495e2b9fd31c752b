"""`shards`: images to tars and their index, an index of tars that are there, and their verification."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dist_trainer.config.arguments import Parser, new_parser, parse
from dist_trainer.distributed.cores import cores
from dist_trainer.errors import UserError, nearest, plural
from dist_trainer.storage.secret import refuse_secrets

if TYPE_CHECKING:
    from dist_trainer.packing.sources import Source
    from dist_trainer.packing.write import Recipe


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
    option("allow_bad", type=int, default=0, help="images of a split that cannot be used and are left out")
    option("quality", type=int | None, default=None, help="of those JPEGs (default: 95)")
    values = parse(parser, argv)
    if values.quality is not None and values.max_side is None:
        raise UserError("--quality: is that of images that --max_side makes smaller; others are taken as they are")
    _check_allowed(values.allow_bad)
    from rich.console import Console

    from dist_trainer.packing.pack import BadImagesError, found_bad, unfinished
    from dist_trainer.packing.splits import SPLITS, find_splits, lacking
    from dist_trainer.packing.write import Recipe

    chosen = {name: values[name] for name in ("samples_per_shard", "seed", "max_side", "quality")}
    recipe = Recipe(**{name: value for name, value in chosen.items() if value is not None})
    with Console().status(f"listing {values.source}"):  # 100 s for the headers in ILSVRC2012_img_train.tar
        splits = find_splits(
            values.source,
            Path(values.root) if values.root else None,
            labels=values.labels or (),
            val_fraction=values.val_fraction,
            seed=values.seed,
            found_bad=found_bad(Path(values.out), SPLITS),
        )
    refused = []
    for split, source in unfinished(splits, Path(values.out), recipe).items():
        if note := lacking(source):
            _say(note)
        try:
            print(_pack_split(source, Path(values.out) / split, recipe, values.allow_bad))
        except BadImagesError as error:  # those of the other split are told in one go
            refused.append(str(error))
    if refused:
        raise UserError("\n".join(refused))
    return 0


def _pack_split(source: "Source", out: Path, recipe: "Recipe", allow_bad: int) -> str:
    """A line about the result. Raises BadImagesError."""
    from dist_trainer.data.listing import left_out_text
    from dist_trainer.data.parallel import progress
    from dist_trainer.packing.pack import BAD_FILE, pack
    from dist_trainer.packing.write import read_bad

    began, done = time.monotonic(), 0
    with progress(f"packing {out.name}", len(source), in_bytes=False, say=_say) as advance:
        for samples in pack(source, out, recipe, num_processes=cores(), allow_bad=allow_bad, say=_say):
            advance(samples)
            done += samples
    bad = len(read_bad(out / BAD_FILE))
    rest = left_out_text(source.left_out) + (f"; {plural(bad, 'bad image')} left out ({BAD_FILE})" if bad else "")
    rate = f"{done / max(time.monotonic() - began, 1e-3):,.0f} images/s"
    return f"{out}: {plural(len(source) - bad, 'sample')}, {plural(len(source.class_names), 'class')}, {rate}{rest}"


def _say(line: str) -> None:
    print(line, flush=True)  # into a log at once, not when it is over


def _index(argv: list[str]) -> int:
    parser = new_parser(
        "shards index", "The index of WebDataset tars that are there: every sample is looked at once.", config=False
    )
    parser.add_argument(
        "url", nargs="+", type=str, help="tars, a brace pattern of them or their folder; paths or URLs such as s3://"
    )
    parser.add_argument("--out", type=str | None, default=None, help="the index, NAME.dtx; default: beside the tars")
    parser.add_argument("--label", type=str | None, default=None, help="where labels are: cls, json:KEY or key")
    parser.add_argument("--image", type=str | None, default=None, help="which of a sample's images: left.jpg")
    parser.add_argument("--classes", type=str | None, default=None, help="a file of class names, a line for each")
    parser.add_argument("--allow_bad", "--allow-bad", type=int, default=0, help="bad samples that are accepted")
    _add_storage_options(parser)
    _add_processes(parser)
    values = parse(parser, argv)
    _check_processes(values.processes)
    refuse_secrets("--storage_options", values.storage_options or {})
    _check_allowed(values.allow_bad)
    from dist_trainer.shards.prepare import index_shards

    print(
        index_shards(
            values.url,
            Path(values.out).expanduser() if values.out else None,
            label=values.label,
            image=values.image,
            classes=values.classes,
            allow_bad=values.allow_bad,
            options=values.storage_options,
            num_processes=values.processes,
            say=_say,
        )
    )
    return 0


def _check(argv: list[str]) -> int:
    parser = new_parser("shards check", "Hold shards against their index, and list the bad samples.", config=False)
    parser.add_argument("location", type=str, help="an index, or what data.train may name")
    parser.add_argument(
        "--level",
        type=Literal["headers", "crc", "decode"],
        default="crc",
        help="headers: what the tars say of each sample; crc: every byte; decode: every image too",
    )
    parser.add_argument("--json", type=str | None, default=None, help="a file to write what was found to")
    _add_storage_options(parser)
    _add_processes(parser)
    values = parse(parser, argv)
    _check_processes(values.processes)
    refuse_secrets("--storage_options", values.storage_options or {})
    from dist_trainer.shards.check import check_index
    from dist_trainer.shards.prepare import find_index

    index = find_index(values.location, options=values.storage_options)
    found = check_index(index, values.level, options=values.storage_options, num_processes=values.processes, say=_say)
    for bad in found:
        print(bad)
    if values.json is not None:
        try:
            Path(values.json).expanduser().write_text(json.dumps([asdict(bad) for bad in found], indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json: {values.json}: {error.strerror or error}") from None
    state = f"{len(found):,} bad" if found else "all good"
    known = f"; {len(index.problems):,} more were bad when they were indexed" if index.problems else ""
    size = f"{plural(len(index), 'sample')}, {plural(len(index.shards), 'shard')}"
    print(f"{values.location}: {size}, {values.level}: {state}{known}")
    return 1 if found else 0


def _add_storage_options(parser: Parser) -> None:
    parser.add_argument(
        "--storage_options",
        "--storage-options",
        type=dict[str, Any] | None,
        default=None,
        help="what fsspec needs besides credentials, such as {anon: true}",
    )


def _add_processes(parser: Parser) -> None:
    parser.add_argument("--processes", type=int, default=cores(), help="how many shards are read at a time")


def _check_allowed(allow_bad: int) -> None:
    if allow_bad < 0:
        raise UserError(f"--allow_bad: {allow_bad} is negative")


def _check_processes(processes: int) -> None:
    if processes < 1:
        raise UserError(f"--processes: {processes} is not positive")


COMMANDS: dict[str, Callable[[list[str]], int]] = {"pack": _pack, "index": _index, "check": _check}


USAGE = """usage: dist-trainer shards pack SOURCE OUT | index URL... | check LOCATION

  pack SOURCE OUT   images -> tars and their index
  index URL...      an index of existing tars
  check LOCATION    compare shards with their index; lists bad samples

`dist-trainer shards pack --help` and so on tell their options.
"""


def command(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if not argv:
        raise UserError(f"shards: say what to do: {', '.join(COMMANDS)}; dist-trainer shards --help")
    if argv[0] not in COMMANDS:
        raise UserError(f"shards: no command {argv[0]!r}{nearest(argv[0], COMMANDS)}; there are {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]](argv[1:])
