"""The end of a run: summary.json, STATE, and the table that a person reads."""

import time
from typing import Any

from dist_trainer.distributed.collectives import on_main
from dist_trainer.errors import UserError, plural
from dist_trainer.log.names import SCORES
from dist_trainer.plan import Plan
from dist_trainer.run.advice import keys_to_turn
from dist_trainer.run.pictures import draw_predictions
from dist_trainer.run.promise import promise
from dist_trainer.run.saving import last_copies
from dist_trainer.run.state import Run
from dist_trainer.run_folder.environment import git_revision
from dist_trainer.run_folder.folder import State
from dist_trainer.run_folder.identity import Change
from dist_trainer.tricks.diagnosis import diagnose


def finish_run(run: Run, state: State, reason: str | None = None) -> dict[str, Any]:
    """Wait for the last writes, write summary.json and STATE, close what was opened; the summary (collective).

    `reason` is why the run ends before its last step: the name of a signal, or what went wrong. Raises UserError, after
    all this, for a run that has made its steps and whose checkpoints could not be written: its state is "failed".
    """
    record, progress = run.record, run.progress
    missing = last_writes(run)
    if missing and state in ("done", "mistake"):
        state = "failed"
    if state == "failed":
        reason = "; and ".join(filter(None, [reason, missing])) or "checkpoints could not be written"
    seconds = time.perf_counter() - record.started
    summary: dict[str, Any] = {
        **how_it_ends(state, reason, progress.step, run.plan),
        "missing": missing,
        "bad_samples": record.bad_samples.num_bad,
        "skipped": progress.skipped,
        "bits": promise(run.config, run.sums.num_beyond),
        "weights_sha256": run.learner.weights.digests(),
        "changes": record.folder.read_changes() if run.world.is_main else [],
        "final": progress.last,
        "best": progress.best,
        "diagnosis": _diagnosis(run),
        "seconds": {"all": seconds, **record.seconds, "train": seconds - sum(record.seconds.values())},
        "world": run.world.size,
        "git": git_revision() if run.world.is_main else None,
    }

    def close() -> None:
        record.folder.write_summary(summary)
        record.folder.write_state(state)
        record.tracker.close(is_done=state == "done")  # reads these; W&B may wait for a network
        last_copies(run)
        record.folder.release()

    if state == "done":
        on_main(run.world, lambda: draw_predictions(run))
    on_main(run.world, close)
    run.streams.close()
    run.learner.engine.close()
    if state == "failed":
        raise UserError(f"stopped after step {progress.step}: {reason}. Make room or mend it, then start again")
    return summary


def last_writes(run: Run) -> str | None:
    """Wait for what is being written, after a stop as long as checkpoint.grace says; what is missing (collective)."""
    began, writer = time.perf_counter(), run.record.folder.writer

    def wait() -> tuple[str | None, list[str]]:
        return writer.finish(), writer.tell()

    missing, news = on_main(run.world, wait)
    for line in news:
        run.record.tracker.terminal.say(line)
    run.record.seconds["save"] += time.perf_counter() - began
    return missing


def how_it_ends(state: State, reason: str | None, step: int, plan: Plan) -> dict[str, Any]:
    """The first keys of summary.json, which are there at any end."""
    return {"state": state, "reason": reason, "steps": step, "epochs": plan.epoch(step)}


def _diagnosis(run: Run) -> dict[str, Any] | None:
    """From the last evaluation, if enough training samples were scored."""
    progress, streams = run.progress, run.streams
    if streams.train_eval is None or not progress.train_eval:
        return None
    train, val = progress.train_eval["top1"], progress.last["model"]["top1"]
    verdict = diagnose(train, val, streams.train_eval.num_samples, streams.val.num_samples)
    if verdict is None:
        return None
    return {"verdict": verdict, "train_top1": train, "val_top1": val, "turn": keys_to_turn(run.config, verdict)}


def _accuracy(values: dict[str, float]) -> str:
    return f"top-1 {values['top1']:.2%}  top-5 {values['top5']:.2%}  loss {values['loss']:.4f}"


def summary_rows(summary: dict[str, Any]) -> dict[str, str]:
    """The summary as a person reads it."""
    rows = {}
    for name, values in summary["final"].items():
        rows[SCORES[name][1]] = _accuracy(values)
    if best := summary["best"]:
        if "average" in summary["final"] and not best["weights"].startswith("average"):
            rows["average"] = "does not help here"
        rows["best"] = f"{_accuracy(best)} at step {best['step']} ({SCORES[best['weights']][1]})"
    if found := summary.get("diagnosis"):
        seen = f"{found['train_top1']:.2%} on training samples, {found['val_top1']:.2%} in validation"
        rows["diagnosis"] = f"{found['verdict']}: top-1 {seen}"
        if found["turn"]:
            rows["keys to turn"] = "\n".join(found["turn"])
    seconds = summary["seconds"]
    if "bits" in summary:
        rows["bits"] = summary["bits"] + "".join(
            f"\n{name}: sha256 {digest[:16]}..." for name, digest in summary["weights_sha256"].items()
        )
    rows["steps"] = f"{summary['steps']} ({plural(summary['epochs'], 'epoch')}, {summary['skipped']} skipped)"
    if bad := summary.get("bad_samples"):
        rows["bad samples"] = f"{bad:,} training samples could not be used; bad_samples.jsonl lists them"
    if changes := summary["changes"]:
        rows["changed"] = "\n".join(
            f"from step {each['step']}: {Change(each['key'], each['old'], each['new'])}" for each in changes
        )
    rows["time"] = (
        f"training {seconds['train']:.1f} s, evaluation {seconds['eval']:.1f} s, saving {seconds['save']:.1f} s"
        f" on {plural(summary['world'], 'rank')}"
    )
    return rows
