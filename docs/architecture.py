"""Draws the rooms of the package and the imports between them into docs/architecture.svg.

    python docs/architecture.py

Every arrow is an import in the code. An arrow that follows from others, A > C beside A > B > C, is left out, so that
the picture can be read. `tests/test_docs.py` checks that the file is current.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "fastflowgrpo"
PICTURE = Path(__file__).with_name("architecture.svg")
PLACES = {  # (column, row)
    "train": (0, 0),
    "doctor": (1, 0),
    "evaluate": (2, 0),
    "push": (3, 0),
    "export": (4, 0),
    "view": (5, 0),
    "demo": (6, 0),
    "serve": (7, 0),
    "trainer": (0, 1),
    "viewing": (5, 1),
    "demonstration": (6, 1),
    "runs": (1, 2),
    "planning": (0, 3),
    "evaluation": (2, 3),
    "learning": (1, 4),
    "rewards": (4, 4),
    "sampling": (1, 5),
    "scoring": (4, 5),
    "results": (2, 6),
    "policy": (0, 6),
    "shapes": (2, 7),
    "prompts": (3, 7),
    "config": (3, 8),
    "distributed": (4, 8),
    "console": (0, 9),
    "kernels": (1, 9),
    "errors": (3, 9),
}
EXEMPT = {"__init__", "rewards.__main__", "prompts.__main__", "shapes.pretrain"}  # commands, and the public door
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 104, 32, 44, 36, 12


def imports() -> dict[str, set[str]]:
    """The rooms that each room imports, from the statements in its files."""
    arrows: dict[str, set[str]] = {room: set() for room in PLACES}
    for path in sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")]):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        room = module.split(".")[0]
        if module in EXEMPT:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                target = name.split(".")[1:2]
                if name.startswith("fastflowgrpo.") and target[0] in arrows and target[0] != room:
                    arrows[room].add(target[0])
    return arrows


def reduced(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others."""

    def reachable(start: str, without: str) -> set[str]:
        rooms, waiting = {without}, [start]
        while waiting:
            room = waiting.pop()
            if room not in rooms:
                rooms.add(room)
                waiting += arrows[room]
        return rooms

    return [
        (start, end)
        for start, ends in arrows.items()
        for end in sorted(ends)
        if not any(end in reachable(middle, without=start) for middle in ends - {end})
    ]


def draw(arrows: list[tuple[str, str]]) -> str:
    """The SVG: a box for each room, an arrow for each import."""
    columns, rows = (max(place[axis] for place in PLACES.values()) + 1 for axis in (0, 1))
    width, height = columns * (WIDTH + GAP_X) - GAP_X + 2 * MARGIN, rows * (HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    corners = {
        room: (MARGIN + column * (WIDTH + GAP_X), MARGIN + row * (HEIGHT + GAP_Y))
        for room, (column, row) in PLACES.items()
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="14">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#607d8b"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>',
    ]
    for start, end in arrows:
        lines.append(
            f'<path d="{_curve(corners[start], corners[end])}" fill="none" stroke="#607d8b" stroke-width="1.4" '
            f'marker-end="url(#tip)"><title>{start} imports {end}</title></path>'
        )
    for room, (x, y) in corners.items():
        lines.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#e8eaf6" stroke="#3f51b5"/>'
            f'<text x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2 + 5:g}" text-anchor="middle" fill="#1a237e">{room}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _curve(start: tuple[int, int], end: tuple[int, int]) -> str:
    """From the bottom of a box to the top of another one; from side to side in a row."""
    (x1, y1), (x2, y2) = start, end
    if y1 == y2:
        y = y1 + HEIGHT / 2 + (-5 if x1 < x2 else 5)
        return f"M{x1 + WIDTH * (x1 < x2)} {y:g}H{x2 + WIDTH * (x1 > x2)}"
    x1, y1, x2 = x1 + WIDTH // 2, y1 + HEIGHT, x2 + WIDTH // 2
    bend = max(GAP_Y, (y2 - y1) // 2)
    return f"M{x1} {y1}C{x1} {y1 + bend} {x2} {y2 - bend} {x2} {y2}"


if __name__ == "__main__":
    PICTURE.write_text(draw(reduced(imports())))
    print(PICTURE)
