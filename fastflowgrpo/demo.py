"""``python -m fastflowgrpo.demo``: a web page that shows a prompt's images before and after training (docs/demo.md)."""

import os
import signal
import sys
import tempfile
from collections.abc import Sequence

from fastflowgrpo.config import DemoConfig, parse_demo
from fastflowgrpo.console import print_error, run_and_exit
from fastflowgrpo.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until SIGTERM or Ctrl+C.

    Args:
        argv: the command line without the program; None reads `sys.argv`.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    try:
        config = parse_demo(argv)
        with tempfile.TemporaryDirectory(prefix="fastflowgrpo-demo-", ignore_cleanup_errors=True) as images:
            serve(config, images)
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    return 0


def serve(config: DemoConfig, images: str) -> None:
    """Load the models and serve the page until SIGTERM or Ctrl+C.

    Args:
        config: the settings.
        images: folder for the images that the page shows.

    Raises:
        UserError: a setting, a file or the model is wrong, or Gradio is not installed.
    """
    # Both are read by Gradio.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": images}
    # Imported here, so that --help and a wrong setting do not wait for torch.
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f'{error}; install it with: pip install "fastflowgrpo[demo]"') from error
    from fastflowgrpo.demonstration.examples import demo_prompts
    from fastflowgrpo.demonstration.generation import Demo
    from fastflowgrpo.demonstration.page import build_page, launch

    examples, known = demo_prompts(config)
    page = build_page(Demo.load(config, known), config, examples)
    url, public = launch(page, config)
    print(f"open {url}{f' or {public}' if public else ''}; Ctrl+C ends the demo", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    page.block_thread()  # ends at a KeyboardInterrupt, and closes the server


if __name__ == "__main__":
    run_and_exit(main)
