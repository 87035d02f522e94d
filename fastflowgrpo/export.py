"""``python -m fastflowgrpo.export RUN --format FORMAT --output PATH``: writes a run's weights for other tools
(docs/export.md).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastflowgrpo.console import print_error, run_and_exit
from fastflowgrpo.errors import UserError

FORMATS = ("diffusers", "comfyui", "kohya", "merged")


def main(argv: Sequence[str] | None = None) -> int:
    """Export the weights that the command line names.

    Args:
        argv: the command line without the program; None reads `sys.argv`.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastflowgrpo.export", description="Write the trained weights of a run for another tool."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="a LoRA for diffusers, ComfyUI or kohya's trainers; or merged: a pipeline folder with the trained weights",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PATH", help="new .safetensors file, or for merged new folder"
    )
    parser.add_argument("--checkpoint", type=Path, help="folder of the checkpoint; by default the run's last")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of merged weights; by default bfloat16. A LoRA is float32, as it was trained",
    )
    arguments = parser.parse_args(argv)
    try:
        # Imported here, so that --help and a wrong argument do not wait for torch.
        from fastflowgrpo.runs.checkpoints import last_checkpoint
        from fastflowgrpo.runs.export import export

        checkpoint = arguments.checkpoint or last_checkpoint(arguments.run)
        export(arguments.run, checkpoint, arguments.format, arguments.output, arguments.dtype)
        print(arguments.output)
    except UserError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
