"""The prompts of a run: files, the bundled ones, or made on the spot."""

from fastflowgrpo.config.settings import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import general, geneval, load_prompts, ocr
from fastflowgrpo.prompts.prompt import Prompt
from fastflowgrpo.shapes import scenes

GENERATORS = {"geneval": geneval, "ocr": ocr, "general": general}
# Without evaluation prompts of its own, a run shows what becomes of its first training prompts.
EVAL_PROMPTS = 16


def run_prompts(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """(training, evaluation) prompts of a run.

    Generated training prompts differ from seed to seed and stay away from the evaluation's, which are always the same.

    Raises:
        UserError: a file cannot be read, or there are not enough prompts beside the excluded ones.
    """
    train, evaluation = config.prompts.train, config.prompts.eval
    if evaluation is None and train in ("shapes", *GENERATORS):
        evaluation = train
    held_out = None if evaluation is None else evaluation_prompts("prompts.eval", evaluation)
    try:
        if train in GENERATORS:
            prompts = GENERATORS[train].generate(seed=config.seed, exclude=held_out or ())
        else:
            prompts = scenes.train_prompts() if train == "shapes" else load_prompts(train)
    except (ValueError, OSError) as error:
        raise UserError(f"prompts.train: {error}") from error
    return prompts, prompts[:EVAL_PROMPTS] if held_out is None else held_out


def evaluation_prompts(setting: str, source: str) -> list[Prompt]:
    """The evaluation prompts of a file, of the bundled model, or of a generator.

    Raises:
        UserError: a file cannot be read; names the setting.
    """
    try:
        if source in GENERATORS:
            return GENERATORS[source].evaluation()
        return scenes.eval_prompts() if source == "shapes" else load_prompts(source)
    except (ValueError, OSError) as error:
        raise UserError(f"{setting}: {error}") from error
