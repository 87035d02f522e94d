"""The prompts of a run: files, the bundled ones, or made on the spot."""

from fastflowgrpo.config import Config, ConfigError
from fastflowgrpo.prompts import Prompt, general, geneval, load_prompts, ocr

GENERATORS = {"geneval": geneval, "ocr": ocr, "general": general}
# Without evaluation prompts of its own, a run shows what becomes of its first training prompts.
EVAL_PROMPTS = 16


def run_prompts(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """(training, evaluation) prompts of a run.

    Generated training prompts differ from seed to seed and stay away from the evaluation's, which are always the same.

    Raises:
        ConfigError: a file cannot be read, or there are not enough prompts beside the excluded ones.
    """
    from fastflowgrpo.shapes import scenes

    train, evaluation = config.prompts.train, config.prompts.eval
    if evaluation is None and train in ("shapes", *GENERATORS):
        evaluation = train
    try:
        if evaluation is None:
            held_out = None
        elif evaluation in GENERATORS:
            held_out = GENERATORS[evaluation].evaluation()
        else:
            held_out = scenes.eval_prompts() if evaluation == "shapes" else load_prompts(evaluation)
    except (ValueError, OSError) as error:
        raise ConfigError(f"prompts.eval: {error}") from error
    try:
        if train in GENERATORS:
            prompts = GENERATORS[train].generate(seed=config.seed, exclude=held_out or ())
        else:
            prompts = scenes.train_prompts() if train == "shapes" else load_prompts(train)
    except (ValueError, OSError) as error:
        raise ConfigError(f"prompts.train: {error}") from error
    return prompts, prompts[:EVAL_PROMPTS] if held_out is None else held_out
