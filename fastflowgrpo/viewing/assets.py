"""The files of the page, and the script with the data that stands before them."""

import json
from pathlib import Path
from typing import Any

PAGES = Path(__file__).with_name("pages")
DATA = "data.js"


def data_script(runs: list[dict[str, Any]], live: bool) -> bytes:
    """The script that gives the page its runs: pages opened from a disk cannot fetch files.

    Args:
        runs: their contents; of live runs only the names.
        live: whether the page shall ask the server for the contents, again and again.
    """
    return b"window.fastflowgrpo = " + json.dumps({"live": live, "runs": runs}).encode("ascii") + b";\n"
