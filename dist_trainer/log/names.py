"""The one table of what metrics.jsonl, W&B, TensorBoard, the CSV file and the report hold, by name.

Every line has `step` (updates tried) and `epoch`. README repeats the table.
"""

SCORES = {
    "model": ("val", "model"),
    "model_bn": ("val_bn", "model, BN re-estimated"),
    "ema": ("val_ema", "EMA"),
    "ema_bn": ("val_ema_bn", "EMA, BN re-estimated"),
    "average": ("val_avg", "average"),
    "average_bn": ("val_avg_bn", "average, BN re-estimated"),
}
"""The weights that can be scored: name in files -> (prefix of their metrics, name for people)."""

TRAINING = {
    "train/loss": "mean over samples since the last line; null if no update was made",
    "train/lr": "rate of the last step",
    "train/grad_norm": "of the last step, before clipping",
    "train/skipped": "steps so far that were not made: their gradient was not finite, or a roll-back passed them",
    "train/beyond": "with engine.sums: exact: gradient values so far that it cannot promise",
    "ema/decay": "of the last update",
    "data/bad": "different training samples so far that could not be used",
}
SPEED = {
    "perf/images_per_s": "over all ranks, while training",
    "perf/data_wait": "share of that time that rank 0 waited for data",
    "perf/seconds_data": "that rank 0 waited for data since the last line",
    "perf/seconds_forward": "of its forwards since then; on a GPU, the GPU's",
    "perf/seconds_rest": "of training since then otherwise: backward, exchange, update, EMA",
    "perf/seconds_eval": "of evaluations since then",
    "perf/seconds_save": "of saving since then",
    "perf/failed_saves": "checkpoints, best weights and snapshots of this start that the disk refused",
    "perf/failed_copies": "with run.mirror: copies of this start that its storage refused",
    "perf/memory_host": "bytes: resident peak of the rank with the largest, without its loader processes",
    "perf/memory_device": "bytes: peak of tensors on the GPU, of the rank with the largest",
    "perf/slowest_rank": "the rank with the longest time for data and forwards since then",
    "perf/slowest_by": "its excess over the median rank, as a share of training's time",
    "perf/time": "when the line was written: seconds since 1970",
}
"""These differ from attempt to attempt; all others are the same however often a run was interrupted."""
EVENTS = {
    "run/event": "at each start but the first: what came before, in words",
    "run/world": "the number of ranks from there on",
    "run/restarts": "starts but the first, so far",
    "run/roll_backs": "roll-backs so far",
}
ACCURACY = {"top1": "fraction", "top5": "fraction", "loss": "mean cross-entropy"}
SLICE = {
    **{f"train_eval/{name}": f"{unit} of eval.train_samples training samples" for name, unit in ACCURACY.items()},
    "train_eval/gap": "train_eval/top1 less val/top1",
}
VALIDATION = {
    f"{prefix}/{name}": f"{unit} over the whole validation set: {title}"
    for prefix, title in SCORES.values()
    for name, unit in ACCURACY.items()
}
METRICS = TRAINING | VALIDATION | SLICE | EVENTS | SPEED
"""Name -> meaning."""


def is_of_average(name: str) -> bool:
    """Whether it is a score of the average of snapshots."""
    return name.partition("/")[0] in (SCORES["average"][0], SCORES["average_bn"][0])


def is_evaluation(name: str) -> bool:
    """Whether it is a score of some weights, on validation or on training samples."""
    return name in VALIDATION or name in SLICE
