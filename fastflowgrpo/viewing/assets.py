"""The files of the page, and the script with the data that stands before them."""

import json
from importlib.resources import files
from typing import Any

TYPES = {
    ".svg": "image/svg+xml",
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
DATA = "data.js"


def pages() -> dict[str, bytes]:
    """The content of each file of the page, by its name."""
    folder = files("fastflowgrpo.viewing") / "pages"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def data_script(runs: list[dict[str, Any]], live: bool) -> bytes:
    """The script that gives the page its runs: pages opened from a disk cannot fetch files.

    Args:
        runs: their contents; of live runs only the names.
        live: whether the page shall ask the server for the contents, again and again.
    """
    return b"window.fastflowgrpo = " + json.dumps({"live": live, "runs": runs}).encode("ascii") + b";\n"
