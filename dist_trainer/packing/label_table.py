"""A flat folder of images with their classes in a table, such as ImageNet's original validation set."""

import csv
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath

from dist_trainer.data.listing import IMAGE_SUFFIXES, SUFFIXES_TEXT, list_images, suffix_of
from dist_trainer.errors import UserError
from dist_trainer.packing.sources import ListedImages, require_classes
from dist_trainer.shards.classes import canonical, few, misnumbered


def _bare(name: str) -> str:
    """A file name without folder and image suffix, for comparison with a table."""
    path = PurePosixPath(name)
    return path.stem if suffix_of(name) in IMAGE_SUFFIXES else path.name


def _read_table(table: Path) -> list[tuple[str, str]]:
    """The first two columns, split at commas, semicolons, tabs or blanks."""
    try:
        lines = [line for line in table.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        delimiter = next((d for d in ",;\t" if lines and d in lines[0]), None)
        rows = list(csv.reader(lines, delimiter=delimiter)) if delimiter else [line.split(None, 1) for line in lines]
    except OSError as error:
        raise UserError(f"--labels: {table}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels: {table}: not a table of text ({error})") from None
    for row in rows:
        if len(row) < 2 or not row[0].strip() or not row[1].strip():
            raise UserError(f"--labels: {table}: the row {' '.join(row)!r} is not a file name and a class")
    return [(row[0].strip(), row[1]) for row in rows]


_BOXES = re.compile(r"(\S+)(?: -?\d+){4}(?: .*)?")  # Kaggle's PredictionString: a synset and a box, again and again

_WHOLE = re.compile(r"(\d+)\.0*")


class LabelledFolder(ListedImages):
    """Images anywhere below `root`, with the classes that the CSV `table` gives for their names.

    A header is recognised; so is Kaggle's LOC_val_solution.csv. File names may lack folder and suffix. A class is a
    name, or its number in `class_names`, those of training. Without them the table defines the classes.
    """

    def __init__(
        self,
        root: Path,
        table: Path,
        class_names: tuple[str, ...] | None = None,
        found_bad: Mapping[str, str] | None = None,
    ) -> None:
        listing = list_images(root)
        gone = {file: name for file, name in (found_bad or {}).items() if file not in set(listing.images)}
        files = sorted([*listing.images, *gone])
        if not files:
            raise UserError(f"{root}: no images ({SUFFIXES_TEXT})")
        present = {_bare(file) for file in files}
        _refuse(root, "images have the same name as another one", _repeated(_bare(file) for file in files))
        rows = _read_table(table)
        if rows and _bare(rows[0][0]) not in present and rows[0][1].strip() not in {c.strip() for _, c in rows[1:]}:
            rows = rows[1:]  # a header
        classes = {_bare(name): _class_of(cell, class_names or ()) for name, cell in rows}
        _refuse(table, "images are named twice", _repeated(_bare(name) for name, _ in rows))
        _refuse(table, f"images are not in {root}", classes.keys() - present)
        _refuse(root, f"images have no class in {table}", present - classes.keys() - {_bare(file) for file in gone})
        numbers, names = _number_classes(table, set(classes.values()), class_names)
        labels = [
            numbers[classes[_bare(file)]] if _bare(file) in classes else names.index(gone[file]) for file in files
        ]
        super().__init__(root, files, labels, names, listing.left_out, gone)


def _class_of(cell: str, known: Collection[str]) -> str:
    """The name that a cell gives. A blank at its end counts where a class is called so. 2.0 is 2: a column of numbers
    with an empty cell is often written as floats.
    """
    if cell in known:
        return cell
    cell = cell.strip()
    match = _BOXES.fullmatch(cell) or _WHOLE.fullmatch(cell)
    return match[1] if match else cell


def _number_classes(
    table: Path, found: set[str], class_names: tuple[str, ...] | None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """(the class number of every cell, the class names).

    Raises UserError unless the cells are all in `class_names`, or numbers from 0 on: without `class_names`, all up to
    their largest.
    """
    known = {canonical(name): number for number, name in enumerate(class_names or sorted(found))}
    named = class_names is not None and all(canonical(cell) in known for cell in found)
    if named or not all(cell.isdecimal() for cell in found):
        require_classes(table, found, class_names or sorted(found), subset=True)
        return {cell: known[canonical(cell)] for cell in found}, class_names or tuple(sorted(found))
    numbers = {cell: int(cell) for cell in found}
    size = len(class_names) if class_names else len(found)
    all_there = len(set(numbers.values())) == size or class_names is not None
    if class_names is not None and misnumbered(class_names):
        raise UserError(
            f"{table}: class numbers, and the classes of training are called {few(class_names)}, in the order of text: "
            "which class a number means is open; write the names"
        )
    if not all_there or min(numbers.values()) > 0 or max(numbers.values()) >= size:
        raise UserError(
            f"{table}: {len(found):,} class numbers, {min(numbers.values())} to {max(numbers.values())}: they must be "
            f"0 to {size - 1}, counting the {'class names of training' if class_names else 'classes'} as sorted"
        )
    return numbers, class_names or tuple(str(number) for number in range(size))


def _repeated(names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]


def _refuse(where: object, problem: str, names: Collection[str]) -> None:
    if names:
        raise UserError(f"{where}: {len(names):,} {problem}: {few(names)}")
