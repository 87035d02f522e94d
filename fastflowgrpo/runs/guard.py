"""The guard of a run: which evaluation was the best, and whether a reward that is not trained has fallen since.

Everything follows from the rows of metrics.jsonl. A checkpoint holds them: a resumed run decides as the unbroken one.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastflowgrpo.errors import UserError
from fastflowgrpo.evaluation.guard import GUARD
from fastflowgrpo.runs.checkpoints import checkpoint_step, list_checkpoints
from fastflowgrpo.runs.files import METRICS, read_rows

Rows = Sequence[Mapping[str, Any]]


def guard_fall(rows: Rows, patience: int) -> str:
    """Why the guard should end the run: the last row is an evaluation, and `patience` evaluations in a row have fallen.

    An evaluation has fallen if the guard is more than its standard error below its best value before. One without a
    score does not count.

    Returns:
        A text; "" if there is no reason.
    """
    if not _ends_with_guard(rows):
        return ""
    evaluations = _evaluations(rows)
    falls, best = 0, evaluations[0]
    for row in evaluations:
        fallen = score(row) < score(best) - (row["eval"]["guard_standard_error"] or 0)
        falls, best = falls + 1 if fallen else 0, max(best, row, key=score)
    if falls < patience:
        return ""
    before, now = (f"{score(row):.3f} at step {row['step']}" for row in (best, rows[-1]))
    return f"evaluation.guard: has fallen in {falls} evaluations in a row, from {before} to {now}"


def is_best_by_guard(rows: Rows) -> bool:
    """Whether the last row is an evaluation after an update in which the guard was higher than in those before it."""
    steps = {row["step"] for row in rows} - {0}
    return _ends_with_guard(rows) and best_step(rows, steps) == rows[-1]["step"]


def best_step(rows: Rows, steps: Collection[int]) -> int | None:
    """The step of the evaluation with the highest `score`, the first of equal ones, among those at `steps`."""
    evaluated = [row for row in _evaluations(rows) if row["step"] in steps]
    return max(evaluated, key=score)["step"] if evaluated else None


def best_checkpoint(run: str | Path) -> Path:
    """The checkpoint of a run directory with the best evaluation.

    Raises:
        UserError: no checkpoint has been evaluated.
    """
    folders = {checkpoint_step(folder): folder for folder in list_checkpoints(run)}
    metrics = Path(run) / METRICS
    step = best_step(read_rows(metrics), folders) if metrics.is_file() else None
    if step is None:
        raise UserError(f"run {run} has no checkpoint that was evaluated: there is no best one")
    return folders[step]


def score(row: Mapping[str, Any]) -> float:
    """What evaluations are compared by: the guard, or without one the overall score."""
    evaluation = row["eval"]
    return evaluation["scores"].get(GUARD, evaluation["overall"])


def _evaluations(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows of evaluations with a score."""
    return [row for row in rows if "eval" in row and score(row) is not None]


def _ends_with_guard(rows: Rows) -> bool:
    return bool(rows) and "eval" in rows[-1] and rows[-1]["eval"]["scores"].get(GUARD) is not None
