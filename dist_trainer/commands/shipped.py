"""`ls` and `cp`: the configs and scripts that come with the package, and networks by short name."""

import shutil
from pathlib import Path

from dist_trainer.errors import UserError, nearest


def _shipped() -> dict[str, Path]:
    """Shipped files by the name under which `cp` finds them: imagenet/resnet50_8k, slurm/train.sbatch, ..."""
    package = Path(__file__).parent.parent
    root = package / "shipped" if (package / "shipped").is_dir() else package.parent
    files = {}
    for folder in ("configs", "launch", "slurm"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".yaml", ".sh", ".sbatch"):
                name = path.relative_to(root / folder if folder == "configs" else root)
                files[str(name.with_suffix("") if folder == "configs" else name)] = path
    return files


USAGE = """usage: dist-trainer ls [models] | cp NAME TARGET

  ls               the shipped configs and scripts, a line each
  ls models        networks with a short name, and their parameters
  cp NAME TARGET   copy one of the configs and scripts to a file or into a folder
"""


def list_shipped(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv == ["models"]:
        from dist_trainer.models.build import model_table

        for name, source, parameters in model_table():
            print(f"{name:<20} {parameters:>12,}  {source}")
        return 0
    if argv:
        raise UserError(f"ls: {argv[0]!r}: there is `ls`, of the shipped configs and scripts, and `ls models`")
    files = _shipped()
    width = max(len(name) for name in files) + 2
    for name, path in files.items():
        first = next((line.lstrip("# ").strip() for line in path.read_text().splitlines() if line.startswith("# ")), "")
        print(f"{name:<{width}}{first}")
    return 0


def copy_shipped(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if len(argv) != 2:
        raise UserError("cp: give a name that dist-trainer ls shows, and a target file or folder")
    files = _shipped()
    name = argv[0].removesuffix(".yaml")
    if name not in files:
        raise UserError(f"{argv[0]}: not shipped{nearest(name, files)}; dist-trainer ls shows what is")
    target = Path(argv[1])
    target = target / files[name].name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target}: exists; remove it, or name another file")
    try:
        shutil.copy(files[name], target)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror or error}") from None
    print(target)
    return 0
