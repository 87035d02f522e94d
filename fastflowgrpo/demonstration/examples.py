"""The prompts that the demo offers, and the prompts whose GenEval metadata it knows."""

from collections.abc import Sequence

from fastflowgrpo.config import DemoConfig, read_run
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.prompts.sources import evaluation_prompts, run_prompts
from fastflowgrpo.shapes import scenes

TASKS = {"geneval": "GenEval", "ocr": "OCR", "general": "PickScore and other preferences"}
PER_TAG, PER_TASK = 2, 6  # examples


def demo_prompts(config: DemoConfig) -> tuple[dict[str, list[Prompt]], dict[str, Prompt]]:
    """Choose the prompts of a demo.

    Returns:
        The examples by title, and all known prompts by their text: a prompt that a visitor types has the metadata of
        the known one.

    Raises:
        UserError: a file of prompts or the run cannot be read.
    """
    own: list[Prompt] = []
    known: list[Prompt] = []
    if config.prompts is not None:
        own = evaluation_prompts("prompts", config.prompts)
    elif config.run is not None:
        known, own = run_prompts(read_run(config.run))
    elif config.model == "shapes":
        known, own = scenes.train_prompts(), scenes.eval_prompts()
    groups = {"Prompts of this model": own} if own else {}
    if config.model != "shapes":  # the bundled model knows only the words of its own prompts
        groups |= {title: evaluation_prompts("prompts", task) for task, title in TASKS.items()}
    known = [*known, *(prompt for prompts in groups.values() for prompt in prompts)]
    return {title: spread(prompts) for title, prompts in groups.items()}, {prompt.text: prompt for prompt in known}


def spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """A few prompts, evenly spaced: some of each GenEval tag, or some of all where there are no tags."""
    by_tag: dict[str | None, dict[str, Prompt]] = {}
    for prompt in prompts:
        by_tag.setdefault(prompt.metadata.get("tag"), {})[prompt.text] = prompt
    count = PER_TASK if len(by_tag) == 1 else PER_TAG
    distinct = [list(tagged.values()) for tagged in by_tag.values()]
    return [prompt for tagged in distinct for prompt in tagged[:: -(-len(tagged) // count)]]
