"""Random prompts without duplicates."""

from collections.abc import Callable
from itertools import repeat

from fastflowgrpo.prompts.prompt import Prompt

MAX_FAILED_DRAWS = 2000  # successive draws without a new prompt before an error


def distinct(draw: Callable[[], Prompt], count: int, excluded: Callable[[Prompt], bool]) -> list[Prompt]:
    """Calls `draw` until there are `count` prompts with different texts.

    Args:
        draw: returns a random prompt.
        count: number of prompts to return.
        excluded: whether a prompt must not be returned.

    Raises:
        ValueError: `draw` returns no new prompt any more.
    """
    found: dict[str, Prompt] = {}
    while len(found) < count:
        before = len(found)
        for _ in repeat(None, MAX_FAILED_DRAWS):
            prompt = draw()
            if prompt.text not in found and not excluded(prompt):
                found[prompt.text] = prompt
                break
        if len(found) == before:
            raise ValueError(f"{count} different prompts were asked for, but only {before} were found")
    return list(found.values())
