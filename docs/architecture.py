"""Draws the rooms of the package and the imports between them into docs/architecture.svg.

    python docs/architecture.py

Every arrow is an import in the code. An arrow that follows from others, A > C beside A > B > C, is left out, so that
the picture can be read. `tests/test_docs.py` checks that the file is current.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "fastflowgrpo"
PICTURE = Path(__file__).with_name("architecture.svg")
ROWS = (
    ("train", "evaluate", "push", "serve"),
    ("trainer",),
    ("runs",),
    ("evaluation", "planning"),
    ("learning", "rewards"),
    ("sampling", "scoring"),
    ("policy",),
    ("prompts", "shapes"),
    ("distributed", "config"),
    ("console", "errors", "results", "kernels"),
)
EXEMPT = {"__init__", "rewards.__main__", "prompts.__main__", "shapes.pretrain"}  # commands, and the public door
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 118, 34, 64, 46, 16


def imports() -> dict[str, set[str]]:
    """The rooms that each room imports, from the statements in its files."""
    arrows: dict[str, set[str]] = {room: set() for row in ROWS for room in row}
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
    below = {room: set(targets) for room, targets in arrows.items()}
    for middle in arrows:  # transitive closure
        for room in arrows:
            if middle in below[room]:
                below[room] |= below[middle]
    return [(a, b) for a in arrows for b in sorted(arrows[a]) if not any(b in below[c] for c in arrows[a] - {b})]


def draw(arrows: list[tuple[str, str]]) -> str:
    """The SVG: a box for each room, an arrow for each import."""
    widest = max(len(row) for row in ROWS)
    place = {}
    for number, row in enumerate(ROWS):
        left = MARGIN + (widest - len(row)) * (WIDTH + GAP_X) / 2
        for column, room in enumerate(row):
            place[room] = left + column * (WIDTH + GAP_X), MARGIN + number * (HEIGHT + GAP_Y)
    width = 2 * MARGIN + widest * WIDTH + (widest - 1) * GAP_X
    height = 2 * MARGIN + len(ROWS) * HEIGHT + (len(ROWS) - 1) * GAP_Y
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="14">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#78909c"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>',
    ]
    for start, end in arrows:
        (x1, y1), (x2, y2) = place[start], place[end]
        x1, y1, x2, bend = x1 + WIDTH / 2, y1 + HEIGHT, x2 + WIDTH / 2, (y2 - y1 - HEIGHT) / 2
        lines.append(
            f'<path d="M{x1:g} {y1:g}C{x1:g} {y1 + bend:g} {x2:g} {y2 - bend:g} {x2:g} {y2:g}" fill="none" '
            f'stroke="#78909c" stroke-width="1.3" marker-end="url(#tip)"><title>{start} imports {end}</title></path>'
        )
    for room, (x, y) in place.items():
        lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#e8eaf6" stroke="#3f51b5"/>'
            f'<text x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2 + 5:g}" text-anchor="middle" fill="#1a237e">{room}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(reduced(imports())))
    print(PICTURE)
