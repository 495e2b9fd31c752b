"""The house: who may import whom, how long files and functions may get, and that the loop fits one screen."""

import ast
from pathlib import Path

import dist_trainer

PACKAGE = Path(dist_trainer.__file__).parent
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
CODE = {file for file in FILES if file != "__init__"}

# From the ground up: a room imports from the floors below, and from itself. Rooms of one floor do not know each other.
FLOORS = [
    ["errors"],
    ["tensors", "plan"],
    ["draws", "by_name", "distributed/"],
    ["storage/"],
    ["run_folder/", "data/", "tricks/", "log/"],
    ["models/", "shards/"],
    ["engine/", "packing/"],
    ["config/"],
    ["run/"],
    ["train", "report/"],
    ["commands/"],
    ["__main__"],
]
DOORS = {
    "deepspeed": {"engine/deepspeed"},
    "wandb": {"log/wandb_run"},
    "jsonargparse": {"config/arguments"},
}
"""The files that may import a library."""


def floor_and_room(file: str) -> tuple[int, str]:
    """Of a file such as data/order."""
    room = f"{file.partition('/')[0]}/" if "/" in file else file
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return floor, room
    raise AssertionError(
        f"{file}.py is in no room of FLOORS: a new file belongs into a folder, a new folder on a floor"
    )


def imported(file: str, lazily: bool = True) -> set[str]:
    """Full names of what `file` imports: a.b for `import a.b`, a.b.c for `from a.b import c`.

    `lazily`: also inside functions.
    """
    names: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(FILES[file].read_text())]
    while nodes:
        node = nodes.pop()
        if lazily or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(names: set[str]) -> set[str]:
    """The files of this package among imported names: dist_trainer.data.order.Ids is data/order."""
    paths = {name.removeprefix("dist_trainer.").replace(".", "/") for name in names if name.startswith("dist_trainer.")}
    files = {path if path in FILES else path.rpartition("/")[0] for path in paths}
    return {file if file in FILES else f"{file}/__init__" for file in files} & CODE


def test_imports_lead_down_or_stay_in_the_room() -> None:
    """Also those inside functions. Fails when, say, data/stream.py imports engine/, or tricks/ imports data/."""
    wrong = []
    for file in sorted(CODE):
        floor, room = floor_and_room(file)
        for other in sorted(own(imported(file))):
            other_floor, other_room = floor_and_room(other)
            if other_room != room and other_floor >= floor:
                wrong.append(f"{file} imports {other}")
    assert not wrong


def test_few_files_lie_loose_at_the_root() -> None:
    """The loop, the arithmetic, and what every room needs. Fails when a ninth file appears."""
    assert len([file for file in FILES if "/" not in file]) <= 8


def test_there_are_no_import_cycles() -> None:
    """At module level; files without unvisited imports are taken away until none is left.

    Fails when two files of one room import each other.
    """
    graph = {file: own(imported(file, lazily=False)) for file in CODE}
    while free := {file for file, others in graph.items() if not others & graph.keys()}:
        graph = {file: others for file, others in graph.items() if file not in free}
    assert not graph


def users_of(library: str) -> set[str]:
    """Files that import `library` anywhere."""
    return {file for file in CODE if any(name.split(".")[0] == library for name in imported(file))}


def test_each_library_has_one_door() -> None:
    """So it can be understood, pinned or replaced in one place. Fails when another file imports it, even lazily."""
    assert {library: users_of(library) for library in DOORS} == DOORS


def functions() -> dict[str, ast.FunctionDef]:
    """Every function and method of the package, by file and name."""
    return {
        f"{file}:{node.name}:{node.lineno}": node
        for file, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def length(node: ast.FunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_files_and_functions_stay_short_enough_to_read() -> None:
    """Fails when a file outgrows 350 lines, or a function 60."""
    lengths = {file: len(path.read_text().splitlines()) for file, path in FILES.items()}
    assert {file: lines for file, lines in lengths.items() if lines > 350} == {}
    assert {name: length(node) for name, node in functions().items() if length(node) > 60} == {}


def test_putting_a_run_together_reads_as_a_table_of_contents() -> None:
    """Fails when a step of the construction outgrows 40 lines."""
    files = ("run/start:", "run/claim:", "run/restore:", "run/start_from:", "run/data:", "run/blueprint:")
    steps = {name: length(node) for name, node in functions().items() if name.startswith(files)}
    assert len(steps) >= 10
    assert {name: lines for name, lines in steps.items() if lines > 40} == {}


def test_test_files_stay_short_enough_to_read() -> None:
    """Fails when a file of tests outgrows 450 lines."""
    lengths = {path.name: len(path.read_text().splitlines()) for path in Path(__file__).parent.rglob("*.py")}
    assert {file: lines for file, lines in lengths.items() if lines > 450} == {}


def test_the_loop_fits_one_screen() -> None:
    """Fails when `train` outgrows 45 lines."""
    assert length(next(node for name, node in functions().items() if name.startswith("train:train:"))) <= 45
