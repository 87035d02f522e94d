"""``python -m fastflowgrpo.rewards``: scores image files."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fastflowgrpo.console import print_error
from fastflowgrpo.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Score the images that the command line names, and print a table with a row for each.

    Args:
        argv: the command line without the program; by default the process's.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    try:
        arguments = _parser().parse_args(argv)
        metadata = _json_object("--metadata", arguments.metadata)
        columns = score(arguments.images, arguments.prompt, _rewards(arguments.rewards), metadata)
        for row in _table({"image": arguments.images, **columns}):
            print(row)
    except (ValueError, OSError) as error:
        return print_error(error)
    return 0


def score(
    paths: Sequence[str], prompt: str, rewards: dict[str, Any], metadata: dict[str, Any]
) -> dict[str, list[float]]:
    """Score image files against a prompt.

    Args:
        paths: of the images; images of the same size are scored together, as one group.
        prompt: the prompt of all images.
        rewards: as in a training configuration, see `build_rewards`.
        metadata: the prompt's GenEval metadata, {} for none.

    Returns:
        The values of each reward and detail under its name, and the weighted sum as "reward"; NaN where a score is
        missing.

    Raises:
        ValueError: the configuration is wrong, or a reward cannot score the prompt.
        OSError: a file is no image.
    """
    import numpy as np
    import torch
    from PIL import Image

    from fastflowgrpo.prompts import Prompt
    from fastflowgrpo.rewards import RewardBatch, build_rewards

    images = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in paths]
    sizes: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(i)
    weighted = build_rewards(rewards)
    weighted.check_prompts([Prompt(prompt, metadata)])
    columns: dict[str, list[float]] = {}
    for members in sizes.values():
        batch = RewardBatch(
            torch.stack([images[i] for i in members]),
            [prompt] * len(members),
            [metadata] * len(members),
            torch.zeros(len(members), dtype=torch.int64),
        )
        scores = weighted(batch)
        for name, values in {**scores.details, "reward": scores.values}.items():
            column = columns.setdefault(name, [float("nan")] * len(images))
            for i, value in zip(members, values.tolist(), strict=True):
                column[i] = value
    return columns


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m fastflowgrpo.rewards", description="Score images with rewards.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--prompt", required=True, help="the text they were made from")
    parser.add_argument(
        "--rewards", required=True, help="names, as in ocr,pickscore, or a JSON object of weights and settings"
    )
    parser.add_argument("--metadata", default="{}", help="the prompt's GenEval metadata, a JSON object")
    return parser


def _rewards(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        return _json_object("--rewards", text)
    return {name.strip(): 1.0 for name in text.split(",")}


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{option}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(value, dict):
        raise UserError(f"{option}: expected a JSON object, got {value!r}")
    return value


def _table(columns: dict[str, Sequence[str] | Sequence[float]]) -> list[str]:
    """Format the columns, aligned, with their names in the first row."""
    cells = [
        [name, *(f"{value:.4f}" if isinstance(value, float) else value for value in values)]
        for name, values in columns.items()
    ]
    widths = [max(map(len, column)) for column in cells]
    first, *others = widths
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in zip(*cells, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
