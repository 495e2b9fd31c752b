"""The house: who may import whom, how long a file may get, and that the loop fits one screen."""

import ast
from pathlib import Path

import dist_trainer

PACKAGE = Path(dist_trainer.__file__).parent
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# From the ground up: a file imports from the floors below, and from its own room.
FLOORS = [
    [{"errors"}],
    [{"draws"}, {"plan"}, {"by_name"}, {"distributed/"}],
    [{"storage/"}],
    [{"data/"}, {"tricks/"}, {"log/"}],
    [{"run_folder/"}],
    [{"models/"}, {"shards/"}, {"engine/"}],
    [{"packing/"}, {"config/"}],
    [{"run/"}],
    [{"train"}],
    [{"commands/"}],
    [{"__main__"}],
]


def place_of(file: str) -> tuple[int, int]:
    """(floor, room) of a file such as data/order."""
    for floor, rooms in enumerate(FLOORS):
        for number, room in enumerate(rooms):
            if any(file == name or (name.endswith("/") and file.startswith(name)) for name in room):
                return floor, number
    raise AssertionError(f"{file}.py has no floor: give it one in FLOORS")


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


CODE = {file for file in FILES if file != "__init__"}


def test_imports_lead_down_or_stay_in_the_room() -> None:
    """Also those inside functions. Fails when, say, data/stream.py imports engine, or tricks/ imports data/."""
    wrong = [
        f"{file} imports {other}"
        for file in sorted(CODE)
        for other in sorted(own(imported(file)))
        if place_of(other)[0] >= place_of(file)[0] and place_of(other) != place_of(file)
    ]
    assert not wrong


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


def test_deepspeed_and_wandb_have_one_door_each() -> None:
    """Fails when another file imports deepspeed or wandb, even inside a function."""
    assert users_of("deepspeed") == {"engine/zero", "engine/zero_state"}
    assert users_of("wandb") == {"log/wandb_run"}


def test_files_stay_short_enough_to_read() -> None:
    """Fails when a file outgrows 350 lines."""
    lengths = {file: len(path.read_text().splitlines()) for file, path in FILES.items()}
    assert {file: length for file, length in lengths.items() if length > 350} == {}


def test_the_loop_fits_one_screen() -> None:
    """Fails when `train` outgrows 45 lines."""
    tree = ast.parse(FILES["train"].read_text())
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno + 1 <= 45
