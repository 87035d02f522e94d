"""``python -m fastflowgrpo.view RUN [RUN ...]``: shows runs in a browser (docs/view.md)."""

import argparse
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from fastflowgrpo.console import print_error
from fastflowgrpo.errors import UserError
from fastflowgrpo.viewing.contents import named_runs
from fastflowgrpo.viewing.export import export

PORT = 18086


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the pages of the runs that the command line names until Ctrl+C, or export them.

    Args:
        argv: the command line without the program; None reads `sys.argv`.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastflowgrpo.view",
        description="Show the images and curves of runs in a browser, also while they train. "
        "The page is served on this machine only.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="write the pages as files for any web host, and stop"
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"port to listen on; 0 takes a free one (default: {PORT})"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    arguments = parser.parse_args(argv)
    try:
        if not 0 <= arguments.port <= 65535:
            raise UserError(f"port: must be from 0 to 65535, got {arguments.port}")
        runs = named_runs(arguments.runs)
        if arguments.export is not None:
            size = export(runs, arguments.export)
            print(f"{arguments.export / 'index.html'}: {size / 1e6:.1f} MB")
            return 0
        # Imported only here, so that --help and a wrong path do not wait for it.
        from fastflowgrpo.viewing.server import listen, view_server

        with listen(arguments.port) as listener:
            server = view_server(runs)
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            print(f"{address}   Ctrl+C stops", flush=True)
            if not arguments.no_browser and _has_display():
                webbrowser.open(address)
            server.run([listener])
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt:
        pass
    return 0


def _has_display() -> bool:
    """Whether a browser could open a window; without a display it would take over the terminal."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


if __name__ == "__main__":
    sys.exit(main())
