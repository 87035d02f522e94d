"""The prompts of a run: from a file, from the bundled world, or from a generator."""

from fastflowgrpo.config.settings import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import general, geneval, load_prompts, ocr
from fastflowgrpo.prompts.prompt import Prompt
from fastflowgrpo.shapes import edits, scenes

GENERATORS = {"geneval": geneval, "ocr": ocr, "general": general}
WORLD = {"shapes": scenes, "shapes_edit": edits}
# Training prompts that a run evaluates on if it has no evaluation prompts.
EVAL_PROMPTS = 16


def run_prompts(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """(training, evaluation) prompts of a run.

    Generated training prompts depend on the seed and exclude the evaluation prompts, which do not depend on it.

    Raises:
        UserError: a file cannot be read, or there are not enough prompts without the excluded ones.
    """
    train, evaluation = config.prompts.train, config.prompts.eval
    if evaluation is None and train in (*WORLD, *GENERATORS):
        evaluation = train
    held_out = None if evaluation is None else evaluation_prompts("prompts.eval", evaluation)
    try:
        if train in GENERATORS:
            prompts = GENERATORS[train].generate(seed=config.seed, exclude=held_out or ())
        else:
            prompts = WORLD[train].train_prompts() if train in WORLD else load_prompts(train)
    except (ValueError, OSError) as error:
        raise UserError(f"prompts.train: {error}") from error
    return prompts, prompts[:EVAL_PROMPTS] if held_out is None else held_out


def evaluation_prompts(setting: str, source: str) -> list[Prompt]:
    """Evaluation prompts from a file, from the bundled world (WORLD), or from a generator.

    Raises:
        UserError: a file cannot be read; the message names the setting.
    """
    try:
        if source in GENERATORS:
            return GENERATORS[source].evaluation()
        return WORLD[source].eval_prompts() if source in WORLD else load_prompts(source)
    except (ValueError, OSError) as error:
        raise UserError(f"{setting}: {error}") from error
