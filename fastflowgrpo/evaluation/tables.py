"""Tables of evaluations, as Markdown and as text for the terminal."""

import math
from collections.abc import Mapping
from typing import Any

from fastflowgrpo.evaluation.statistics import SectionStatistics, Statistic
from fastflowgrpo.prompts import TAGS

Table = dict[str, SectionStatistics]
"""Column (base, trained, difference) -> section -> row -> statistic."""


def markdown(table: Table) -> str:
    """A Markdown table for each section, with a row for each measure and a column for each evaluation.

    A cell is mean ± standard error; the last column counts the images without a score, base/trained.
    """
    columns = list(table)
    evaluated = [name for name in columns if name != "difference"]
    lines = []
    for title, rows in table[columns[0]].items():
        lines += [f"| {title} | {' | '.join(columns)} | missing |", f"|-|{'-:|' * (len(columns) + 1)}"]
        for row in rows:
            cells = [_cell(table[column][title][row], sign=column == "difference") for column in columns]
            counts = "/".join(str(table[column][title][row].missing) for column in evaluated)
            lines.append(f"| {row} | {' | '.join(cells)} | {counts} |")
        lines.append("")
    return "\n".join(lines)


def _cell(statistic: Statistic, sign: bool) -> str:
    if math.isnan(statistic.mean):
        return "-"
    mean = f"{statistic.mean:{'+' if sign else ''}.3f}"
    return mean if math.isnan(statistic.standard_error) else f"{mean} ± {statistic.standard_error:.3f}"


def before_after_table(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """A text table of two evaluations of a run, with a line for each tag and score.

    Args:
        first, last: the evaluations before and after training, as `Evaluation.row` returns them.
    """
    names = [*(tag for tag in TAGS if tag in first), "overall"]
    pairs: dict[str, tuple[float | None, float | None]] = {
        **{name: (first[name], last[name]) for name in names},
        **{name: (value, last["scores"].get(name)) for name, value in first["scores"].items()},
        "diversity": (first["diversity"], last["diversity"]),
    }
    lines = [f"{str(last['images']) + ' images':24} before   after"]
    lines += [f"{name:24} {a:6.3f}  {b:6.3f}" for name, (a, b) in pairs.items() if a is not None and b is not None]
    return "\n".join(lines)
