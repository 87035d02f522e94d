"""``python -m fastflowgrpo.prompts``: generates prompts, to be saved as a prompt file."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastflowgrpo.console import print_error
from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import load_prompts, ocr
from fastflowgrpo.prompts.prompt import Prompt
from fastflowgrpo.prompts.sources import GENERATORS


def main(argv: Sequence[str] | None = None) -> int:
    """Prints generated prompts, one a line.

    Args:
        argv: the command line without the program's name, by default that of this process.

    Returns:
        The exit code: 0, or 2 after an error that the user can fix.
    """
    try:
        arguments = _parser().parse_args(argv)
        for prompt in _prompts(arguments):
            print(json.dumps(prompt.metadata) if prompt.metadata else prompt.text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, wants no more lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        return print_error(error)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    if arguments.count is not None and arguments.count < 1:
        raise UserError(f"--count must be at least 1, got {arguments.count}")
    if arguments.seed < 0:
        raise UserError(f"--seed must be at least 0, got {arguments.seed}")
    generator = GENERATORS[arguments.kind]
    settings = {"seed": arguments.seed}
    if arguments.evaluation:
        if arguments.exclude or arguments.count or arguments.length:
            raise UserError("--evaluation prints fixed prompts: combine it with --seed only")
        return generator.evaluation(**settings)
    if arguments.count:
        settings["count"] = arguments.count
    if arguments.length:
        if generator is not ocr:
            raise UserError(f"--length is for ocr, not for {arguments.kind}")
        low, high = arguments.length
        if low > high:
            raise UserError(f"--length: the minimum, {low}, is above the maximum, {high}")
        settings["length"] = (low, high)
    return generator.generate(exclude=[p for path in arguments.exclude for p in load_prompts(path)], **settings)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        raise UserError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m fastflowgrpo.prompts",
        description="Print training prompts, one a line: GenEval metadata as JSON, or plain text.",
        allow_abbrev=False,
    )
    parser.add_argument("kind", choices=GENERATORS)
    parser.add_argument(
        "--count", type=int, metavar="N", help="prompts to print; by default 50000 for geneval, else 20000"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random choice; by default 0")
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="evaluation prompts to leave out",
    )
    parser.add_argument("--evaluation", action="store_true", help="print the held-out evaluation prompts instead")
    parser.add_argument(
        "--length",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="ocr: characters of a quoted text; by default 3 24",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
