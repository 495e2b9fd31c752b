"""`report`: how runs went, on one page."""

from pathlib import Path

from dist_trainer.config.arguments import new_parser, parse
from dist_trainer.errors import UserError
from dist_trainer.report.read import RunRecord, read_run
from dist_trainer.run_folder.fetch import local_run
from dist_trainer.storage.storage import is_remote


def command(argv: list[str]) -> int:
    parser = new_parser("report", "One HTML page, and PNG files, of one or several run folders.", config=False)
    parser.add_argument("runs", type=str, nargs="+", help="run folders, also at a URL; they may still train")
    parser.add_argument("--out", type=str | None, default=None, help="folder; default: RUN/report, of several ./report")
    parser.add_argument("--sort", type=str, default="val/top1", help="metric by which several runs are sorted")
    options = parse(parser, argv)
    runs = [read_run(local_run(run, ["best"])) for run in options.runs]
    check_same_classes(runs)
    try:
        from dist_trainer.report.page import write_report
    except ImportError as error:
        raise UserError(f"report: needs {error.name}: pip install 'dist_trainer[report]'") from None
    is_here = len(runs) == 1 and not is_remote(options.runs[0])
    default = runs[0].folder / "report" if is_here else Path("report")
    out = Path(options.out) if options.out else default
    try:
        print(write_report(runs, out, options.sort, print))
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}; name another folder") from None
    return 0


def check_same_classes(runs: list[RunRecord]) -> None:
    """Raises UserError for runs that do not compare."""
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"report: two of the runs are called {twice}; rename a folder")
    known = [run for run in runs if run.classes]
    for run in known:
        if set(run.classes) != set(known[0].classes):
            odd = min(set(run.classes) ^ set(known[0].classes))
            raise UserError(f"report: {known[0].folder} and {run.folder} have different classes, such as {odd!r}")
