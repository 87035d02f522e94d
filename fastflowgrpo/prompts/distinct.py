"""Drawing prompts at random until there are enough different ones."""

from collections.abc import Callable
from itertools import repeat

from fastflowgrpo.prompts.prompt import Prompt

PATIENCE = 2000  # draws in a row that bring nothing new before it gives up


def distinct(draw: Callable[[], Prompt], count: int, excluded: Callable[[Prompt], bool]) -> list[Prompt]:
    """`count` prompts of different texts from `draw`, none of them `excluded`.

    Raises:
        ValueError: `draw` brings nothing new any more.
    """
    found: dict[str, Prompt] = {}
    while len(found) < count:
        before = len(found)
        for _ in repeat(None, PATIENCE):
            prompt = draw()
            if prompt.text not in found and not excluded(prompt):
                found[prompt.text] = prompt
                break
        if len(found) == before:
            raise ValueError(f"{count} different prompts were asked for, but only {before} were found")
    return list(found.values())
