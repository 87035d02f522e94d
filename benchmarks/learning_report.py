"""The tables and the picture of `benchmarks.learning`, from the rows of its runs."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.report import table
from fastflowgrpo.prompts import TAGS

ACCURACIES = (0.8, 0.9, 0.95)
COSTS = {"seconds": (1.0, "s", ".0f"), "images": (1e3, "k images", ".1f"), "flops": (1e12, "TFLOP", ".1f")}
"""Column of a curve -> unit in the tables, its name, and how a number is written."""
# Okabe and Ito's colours, which most colour-blind people can tell apart, without the yellow.
COLORS = ("#0072b2", "#d55e00", "#000000", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888", "#7a5c00")
MARKERS = "os^DvPX*<"
RESULTS, PICTURE, TABLES = "learning.json", "learning.svg", "learning.md"
BEGIN, END = "<!-- python -m benchmarks.learning --report --publish -->", "<!-- end -->"

Curve = dict[str, list[Any]]
"""A column for each of epochs, seconds, images, flops, overall, the tags and diversity; a value for each evaluation."""


def curve(
    rows: Iterable[Mapping[str, Any]], *, seconds: Mapping[str, float], flops: Mapping[str, float], pairs: int
) -> Curve:
    """The evaluations of a run, with what it had spent on training by then.

    Args:
        rows: of metrics.jsonl.
        seconds, flops: of an epoch's "sampling", which includes the rewards, and of its "update" of all pairs. In an
            epoch that trains on fewer, since groups have no spread, the update costs their share.
        pairs: of an epoch.
    """
    spent = {"epochs": 0, "seconds": 0.0, "images": 0, "flops": 0.0}
    points: Curve = {}
    for row in rows:
        if "epoch" in row:
            spent["epochs"] += 1
            spent["images"] += row["images"]
            for name, cost in (("seconds", seconds), ("flops", flops)):
                spent[name] += cost["sampling"] + cost["update"] * row["trained_pairs"] / pairs
            continue
        found = {name: row["eval"][name] for name in ("overall", *TAGS, "diversity")}
        for name, value in (spent | found).items():
            points.setdefault(name, []).append(value if value is None else round(value, 5))
    return points


def reached(points: Curve, cost: str, accuracy: float) -> float | None:
    """The cost at which the overall accuracy first reaches a value, None if it never does.

    It is interpolated between the first evaluation that has reached it and the one before.
    """
    costs, overall = points[cost], points["overall"]
    for i, value in enumerate(overall):
        if value >= accuracy:
            if i == 0:
                return costs[0]
            return costs[i - 1] + (costs[i] - costs[i - 1]) * (accuracy - overall[i - 1]) / (value - overall[i - 1])
    return None


def reduced(curves: Sequence[Curve]) -> dict[str, Any]:
    """What the tables show of a method, with a value for each seed.

    Args:
        curves: one for each seed.
    """
    return {
        "reached": {
            cost: {str(a): [reached(points, cost, a) for points in curves] for a in ACCURACIES} for cost in COSTS
        },
        "before": [points["overall"][0] for points in curves],
        "last": {name: [points[name][-1] for points in curves] for name in ("seconds", "overall", *TAGS, "diversity")},
    }


def cell(values: Sequence[float | None], form: str, none: str = "-") -> str:
    """Mean ± standard deviation of the seeds that have a value, and how many these are if not all.

    Args:
        values: one for each seed.
        form: the format of a number.
        none: the cell if no seed has a value.
    """
    known = [value for value in values if value is not None]
    if not known:
        return none
    text = format(mean(known), form) + (f" ± {stdev(known):{form}}" if len(known) > 1 else "")
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def cost_cell(method: Mapping[str, Any], cost: str, accuracy: float) -> str:
    unit, _, form = COSTS[cost]
    values = method["reached"][cost][str(accuracy)]
    return cell([value if value is None else value / unit for value in values], form, none="not reached")


def summary_table(methods: Mapping[str, Any]) -> str:
    """The seconds to each accuracy, images and FLOPs to one of them, and the accuracy at the end."""
    columns = [("seconds", a) for a in ACCURACIES] + [("images", ACCURACIES[1]), ("flops", ACCURACIES[1])]
    head = [
        "method",
        "seeds",
        *(f"{COSTS[cost][1]} to {accuracy:.2f}" for cost, accuracy in columns),
        "accuracy at the end",
    ]
    rows = []
    for name, method in methods.items():
        last = f"{cell(method['last']['overall'], '.3f')} after {mean(method['last']['seconds']):.0f} s"
        rows.append([name, str(len(method["runs"])), *(cost_cell(method, *column) for column in columns), last])
    return table(head, rows)


def cost_table(methods: Mapping[str, Any]) -> str:
    """The seconds, images and FLOPs to each accuracy."""
    columns = [(cost, accuracy) for cost in COSTS for accuracy in ACCURACIES]
    head = ["method", "seeds", *(f"{COSTS[cost][1]} to {accuracy:.2f}" for cost, accuracy in columns)]
    rows = [
        [name, str(len(method["runs"])), *(cost_cell(method, *column) for column in columns)]
        for name, method in methods.items()
    ]
    return table(head, rows)


def last_table(methods: Mapping[str, Any]) -> str:
    """The last evaluation: accuracy overall and of each tag, and diversity."""
    names = ("overall", *TAGS, "diversity")
    head = ["method", "after s", "overall before", *names]
    rows = []
    for name, method in methods.items():
        spent, before = format(mean(method["last"]["seconds"]), ".0f"), format(mean(method["before"]), ".3f")
        rows.append([name, spent, before, *(cell(method["last"][column], ".3f") for column in names)])
    return table(head, rows)


def caption(result: Mapping[str, Any]) -> str:
    """Where and how the figures were measured."""
    runs = [run for method in result["methods"].values() for run in method["runs"].values()]
    torch = ", ".join(sorted({run["versions"]["torch"] for run in runs}))
    return (
        'Mean ± standard deviation over the seeds; "2 of 3" means that two of three reached it. '
        "Seconds are those of the epochs by the medians of one, measured for all methods in turn. "
        f"{result['machine']}, torch {torch} (`{result['command']}`)."
    )


def picture_link(folder: str = "") -> str:
    return f"![Held-out accuracy of each method over seconds, images and FLOPs]({folder}{PICTURE})"


def tables(result: Mapping[str, Any]) -> str:
    """The markdown of all tables, and the picture."""
    methods = result["methods"]
    parts = [picture_link(), cost_table(methods), last_table(methods), caption(result)]
    return "\n\n".join(parts) + "\n"


def summary(result: Mapping[str, Any]) -> str:
    """The markdown of README: the picture and the shortest table."""
    return "\n\n".join([picture_link("docs/"), summary_table(result["methods"]), caption(result)]) + "\n"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the accuracy over seconds, images and FLOPs: a thin line for each seed, a thick one for their mean."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    matplotlib.rcParams["svg.hashsalt"] = PICTURE  # the same file from the same figures
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for axes, (cost, (unit, label, _)) in zip(panels, COSTS.items(), strict=True):
        for (name, method), color, marker in zip(result["methods"].items(), cycle(COLORS), cycle(MARKERS)):
            curves = [run["curve"] for run in method["runs"].values()]
            x, y = ([points[column][1:] for points in curves] for column in (cost, "overall"))
            for costs, overall in zip(x, y, strict=True):
                axes.plot([value / unit for value in costs], overall, color=color, lw=0.6, alpha=0.5)
            means = [[mean(column) for column in zip(*rows, strict=True)] for rows in (x, y)]
            axes.plot(
                [value / unit for value in means[0]], means[1], color=color, marker=marker, ms=4, lw=1.8, label=name
            )
        axes.set(xscale="log", xlabel="s of training" if cost == "seconds" else label)
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy, strict")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS))
    figure.savefig(path, metadata={"Date": None})


def write(result: Mapping[str, Any], folder: Path) -> str:
    """Write the results, the tables and the picture into a folder, and return the tables."""
    write_results(result, folder / RESULTS)
    draw(result, folder / PICTURE)
    text = tables(result)
    (folder / TABLES).write_text(text)
    return text


def publish(result: Mapping[str, Any], root: Path) -> None:
    """Write the results and the picture where a checkout has them, and the tables into the pages that show them."""
    write_results(result, root / "benchmarks/results" / RESULTS)
    draw(result, root / "docs" / PICTURE)
    for page, text in (("README.md", summary(result)), ("docs/learning.md", tables(result))):
        path = root / page
        path.write_text(with_generated(path.read_text(), text))


def write_results(result: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(result, indent=1, allow_nan=False)
    path.write_text(re.sub(r"\s+(?=[^\[\]{}]*\])", " ", text) + "\n")  # a list on one line


def with_generated(page: str, text: str) -> str:
    """A page with the text between its markers replaced."""
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:begin]}\n\n{text}\n{page[end:]}"
