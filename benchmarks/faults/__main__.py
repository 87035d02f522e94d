"""``python -m benchmarks.faults``: tries every fault, and writes the table of how each ended."""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.faults.cases import Case, Place, all_cases

SHORT = 13  # every so many cases in the short form


def main(argv: list[str] | None = None) -> int:
    """Try the cases that the command line names.

    Returns:
        The exit code: 0 if all ended as expected, otherwise 1.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose group or name has this text")
    parser.add_argument("--short", action="store_true", help=f"one case in {SHORT}")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    parser.add_argument("--output", type=Path, help="file for the table, Markdown")
    arguments = parser.parse_args(argv)
    cases = [case for case in all_cases() if arguments.only in f"{case.group}: {case.name}"]
    if arguments.short:  # the kills of a run belong together
        cases = [case for case in cases if case.group != "random kills"][::SHORT]
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        place = Place(Path(folder), arguments.seed)
        for case in cases:
            rows.append((case, *attempt(case, place)))
    lost = sum(not survived for _, survived, _ in rows)
    print(f"{len(rows)} cases, {len(rows) - lost} survived as expected, {lost} lost")
    if arguments.output:
        arguments.output.write_text(table(rows, arguments.seed))
    return int(lost > 0)


def attempt(case: Case, place: Place) -> tuple[bool, str]:
    """Try a case and print a line: whether it survived as expected, and how it ended."""
    begin = time.monotonic()
    try:
        survived, how = True, case.run(place)
    except AssertionError as error:
        survived, how = False, str(error)
    seconds = time.monotonic() - begin
    print(f"{'survived' if survived else 'LOST':8}  {case.group}: {case.name}  ({how}, {seconds:.1f} s)", flush=True)
    return survived, how


def table(rows: list[tuple[Case, bool, str]], seed: int) -> str:
    """The table as Markdown."""
    survived = Counter(case.group for case, good, _ in rows if good)
    total = Counter(case.group for case, _, _ in rows)
    lines = [
        "# Faults tried by machine",
        "",
        f"`python -m benchmarks.faults --seed {seed} --output docs/faults.md` has put each of these faults",
        "into a training run of the bundled model, and written this page. *The same bits* means that the rows",
        "of `metrics.jsonl` (without times) and the tensors of the last checkpoint are those of a run to which",
        "nothing happened.",
        "",
        "| group | cases | as expected |",
        "|-|-|-|",
        *(f"| {group} | {count} | {survived[group]} |" for group, count in total.items()),
        f"| all | {len(rows)} | {sum(survived.values())} |",
        "",
        "| fault | expected | | how it ended |",
        "|-|-|-|-|",
    ]
    lines += [
        f"| {case.group}: {case.name} | {case.expected} | {'survived' if good else '**lost**'} | {_cell(how)} |"
        for case, good, how in rows
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:120]


if __name__ == "__main__":
    sys.exit(main())
