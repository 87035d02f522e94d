"""Tables and a plot of benchmark results: `python -m benchmarks.report FOLDER`.

It reads the JSON files of pytest-benchmark, `benchmarks.epoch` and `benchmarks.ocr` in the folder, and writes report.md
and, if there are operations, speed.png next to them.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINES = ("eager", "loop")  # variants that the others are compared with
Cells = list[str]


@dataclass
class Measured:
    """One benchmark of pytest-benchmark."""

    operation: str
    """The name of the test and its parameters without size and variant: "loss backward"."""
    size: str
    variant: str
    wall_ms: float
    info: dict[str, Any]

    @property
    def milliseconds(self) -> float:
        """The device time if it was measured, else the wall time."""
        return self.info.get("device_ms", self.wall_ms)


def measured(data: dict[str, Any]) -> Iterator[Measured]:
    """The benchmarks of one JSON file of pytest-benchmark."""
    for entry in data["benchmarks"]:
        rest = dict(entry["params"])
        size, variant = (
            rest.pop(a) if a in rest else rest.pop(b) for a, b in (("size", "rows"), ("variant", "method"))
        )
        operation = " ".join([entry["name"].partition("[")[0].removeprefix("test_"), *map(str, rest.values())])
        yield Measured(operation, str(size), variant, entry["stats"]["median"] * 1e3, entry["extra_info"])


def groups(rows: Iterable[Measured]) -> dict[str, dict[str, dict[str, Measured]]]:
    """operation -> size -> variant -> benchmark."""
    grouped: dict[str, dict[str, dict[str, Measured]]] = {}
    for row in rows:
        grouped.setdefault(row.operation, {}).setdefault(row.size, {})[row.variant] = row
    return grouped


def speed(row: Measured, variants: dict[str, Measured], baseline: str) -> float | None:
    """Speed relative to the baseline at the same size."""
    return variants[baseline].milliseconds / row.milliseconds if baseline in variants else None


def number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def table(head: Cells, rows: Iterable[Cells]) -> str:
    """A markdown table; columns from the third on are right-aligned."""
    rule = ["-"] * 2 + ["-:"] * (len(head) - 2)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def operation_table(sizes: dict[str, dict[str, Measured]]) -> str:
    """The results of one operation: rates and memory on a GPU, time per sample on the CPU."""
    on_gpu = any("device_ms" in row.info for variants in sizes.values() for row in variants.values())
    head = ["size", "variant", "device ms", "wall ms", "GB/s", "of copy rate", "peak MB", "x eager", "x compile"]
    if not on_gpu:
        head = ["samples", "method", "ns per sample", "x loop"]
    rows = []
    for size, variants in sizes.items():
        for variant, row in variants.items():
            cells = [number(row.info.get("ns_per_sample")), number(speed(row, variants, "loop"))]
            if on_gpu:
                cells = [
                    number(row.info.get("device_ms"), ".4f"),
                    number(row.wall_ms, ".4f"),
                    number(row.info.get("gb_per_s"), ".0f"),
                    number(row.info.get("share_of_copy"), ".0%"),
                    number(row.info.get("peak_mb"), ".0f"),
                    number(speed(row, variants, "eager")),
                    number(speed(row, variants, "compile")),
                ]
            rows.append([size, variant, *cells])
    return table(head, rows)


def epoch_table(data: dict[str, Any]) -> str:
    """The result of `benchmarks.epoch`."""
    head = ["recipe", "loop", "images/s", "x eager", "encode s", "rollout s", "decode s", "score s", "update s"]
    head += ["TFLOP/s", "of matrix rate", "peak MB"]
    rows = []
    for recipe in data["recipes"]:
        for name, loop in recipe["loops"].items():
            seconds = [number(loop["seconds"].get(part.removesuffix(" s")), ".2f") for part in head[4:9]]
            rate = loop["tflop_per_s"]
            rows.append(
                [
                    recipe["recipe"],
                    name,
                    number(loop["images_per_s"]),
                    number(loop["speedup"]),
                    *seconds,
                    number(rate),
                    number(rate / data["matrix_tflop_per_s"], ".0%"),
                    number(loop.get("peak_mb"), ".0f"),
                ]
            )
    lines = [
        f"{recipe['recipe']}: {recipe['images']} images an epoch, gradients differ by "
        f"{recipe['relative_gradient_difference']:.1e}."
        for recipe in data["recipes"]
    ]
    return table(head, rows) + "\n\n" + "  \n".join(lines)


def ocr_table(data: dict[str, Any]) -> str:
    """The result of `benchmarks.ocr`."""
    readers: dict[str, dict[str, Any]] = data["readers"]
    head = ["reader", "images", "images/s", "mean score", "exact", *next(iter(readers.values()))["kinds"]]
    rows = [
        [
            name,
            str(data["images"]),
            number(found["images_per_s"]),
            number(found["mean"], ".4f"),
            number(found["exact"], ".1%"),
            *(number(score, ".3f") for score in found["kinds"].values()),
        ]
        for name, found in readers.items()
    ]
    return table(head, rows)


def draw(operations: dict[str, dict[str, dict[str, Measured]]], path: Path) -> str:
    """Plots the speed relative to the baseline, one panel per operation; returns the markdown that shows the plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return 'The plot needs matplotlib: pip install "fastflowgrpo[bench]"'

    columns = min(3, len(operations))
    lines = -(-len(operations) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.5 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for (operation, sizes), axes in zip(operations.items(), panels, strict=False):
        for name in dict.fromkeys(variant for variants in sizes.values() for variant in variants):
            points = [
                (place, ratio)
                for place, variants in enumerate(sizes.values())
                for baseline in BASELINES
                if name in variants and (ratio := speed(variants[name], variants, baseline)) is not None
            ]
            axes.plot(*zip(*points, strict=True) if points else ([], []), "o", label=name)
        axes.set(title=operation, yscale="log", ylabel="times as fast as the baseline")
        axes.set_xticks(range(len(sizes)), sizes, rotation=20, ha="right", fontsize="small")
        axes.grid(axis="y", which="both", alpha=0.3)
        axes.legend(fontsize="small")
    for axes in panels:
        axes.remove()
    figure.savefig(path, dpi=150)
    return f"![Speed relative to the baseline]({path.name})"


def report(folder: Path) -> str:
    """The markdown of all results in a folder; also draws the plot.

    Raises:
        ValueError: the folder has no results.
    """
    parts: list[str] = []
    rows: list[Measured] = []
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            parts.append(f"{path.name} is not JSON ({error}), and left out.")
            continue
        if "benchmarks" in data:
            found = list(measured(data))
            rows += found
            cpu = data["machine_info"]["cpu"].get("brand_raw", data["machine_info"]["machine"])
            devices = {f"{row.info['gpu']}, torch {row.info['torch']}" for row in found if "gpu" in row.info} or {cpu}
            parts.append(f"{path.name}: {', '.join(sorted(devices))}, {len(found)} benchmarks.")
        elif "recipes" in data:
            versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
            rate = f"{data['dtype']} products at {data['matrix_tflop_per_s']:.3g} TFLOP/s"
            parts.append(f"## Epoch\n\n{path.name}: {data['device']}, {rate}; {versions}\n\n{epoch_table(data)}")
        elif "readers" in data:
            versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
            parts.append(f"## OCR\n\n{path.name}: one thread, {data['side']} px; {versions}\n\n{ocr_table(data)}")
        else:
            parts.append(f"{path.name} is not a result of a benchmark, and left out.")
    operations = groups(rows)
    if not operations and not any(part.startswith("## ") for part in parts):
        raise ValueError(f"{folder}: no JSON of pytest-benchmark, benchmarks.epoch or benchmarks.ocr there")
    parts += [f"## {operation}\n\n{operation_table(sizes)}" for operation, sizes in operations.items()]
    if operations:
        parts.append(draw(operations, folder / "speed.png"))
    return "# Benchmarks\n\n" + "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    try:
        text = report(folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    (folder / "report.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
