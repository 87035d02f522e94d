"""The model card of a checkpoint: what was trained and how, its evaluations, and code that loads the weights."""

import inspect
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from fastflowgrpo.config import PRIVATE_REWARD_SETTINGS, START_SETTINGS, Config, read_run
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy import FAMILIES, pipeline_of
from fastflowgrpo.policy.source_images import sources_per_prompt
from fastflowgrpo.policy.weights import FULL, FULL_2, LORA, LORA_2, holds_weights
from fastflowgrpo.results import versions
from fastflowgrpo.runs.files import BEFORE_AFTER, CURVE, METRICS, read_rows, writing
from fastflowgrpo.shapes import BUNDLED

CARD = "README.md"
PICTURES = {BEFORE_AFTER: "Images before and after", CURVE: "Scores while training"}
PLACE = "FOLDER_OR_REPOSITORY"  # stands for the address of the weights until they are pushed
# Settings that do not change the trained weights.
NOT_IN_RECIPE = (*START_SETTINGS, "save_every", "checkpoints_total_limit", "trackers", "evaluation")


def write_card(run: Path, checkpoint: Path) -> Path:
    """Write the model card and copies of the run's pictures into the folder of a checkpoint, ready to be published.

    Args:
        run: directory of a run, finished or not.
        checkpoint: folder checkpoint-STEP of the run, or a folder within one that holds other weights.

    Returns:
        The path of the card.

    Raises:
        UserError: `run` is not the directory of a run, or `checkpoint` not the folder of a checkpoint.
    """
    config = read_run(run)
    steps = re.findall(r"checkpoint-(\d+)", str(checkpoint))
    if not steps or not holds_weights(checkpoint):
        raise UserError(f"checkpoint {checkpoint}: is no folder checkpoint-STEP with trained weights")
    step = int(steps[-1])
    pictures = [name for name in PICTURES if (run / name).is_file()]
    for name in pictures:
        with writing(checkpoint / name):
            shutil.copy(run / name, checkpoint / name)
    name = f"{Path(config.model).name} after Flow-GRPO"
    sections = (
        f"# {name}",
        _description(config, checkpoint, step),
        "\n".join(f"![{PICTURES[picture]}]({picture})" for picture in pictures),
        _evaluation(run, step),
        _use(config, checkpoint),
        _recipe(config),
        _versions(),
    )
    body = "\n\n".join(section for section in sections if section)
    card = ModelCard(f"---\n{_metadata(config, checkpoint, name).to_yaml()}\n---\n\n{body}\n")
    with writing(checkpoint / CARD):
        card.save(checkpoint / CARD)
    return checkpoint / CARD


def _metadata(config: Config, checkpoint: Path, name: str) -> ModelCardData:
    """The YAML block at the head of the card, which the hub reads."""
    lora = (checkpoint / LORA).is_file()
    pipeline = getattr(diffusers, _pipeline(config))
    parameters = inspect.signature(pipeline.__call__).parameters
    source = "image" if _num_sources(config) else "text"
    task = f"{source}-to-{'video' if 'num_frames' in parameters else 'image'}"
    on_the_hub = config.model not in BUNDLED and not Path(config.model).exists()
    return ModelCardData(
        model_name=name,
        base_model=config.model if on_the_hub else None,
        base_model_relation=("adapter" if lora else "finetune") if on_the_hub else None,
        library_name="diffusers",
        pipeline_tag=task,
        tags=["flow-grpo", "reinforcement-learning", *(["lora"] if lora else [])],
    )


def _description(config: Config, checkpoint: Path, step: int) -> str:
    weights = "A LoRA for" if (checkpoint / LORA).is_file() else "The transformer of"
    rewards = ", ".join(config.rewards)
    # Before the first step of the average, and in the folder raw/, the weights are those that were trained.
    averaging = config.update.ema_decay and step >= config.update.ema_every
    averaged = averaging and checkpoint.name == f"checkpoint-{step}"
    average = " These are the exponential moving average of the trained weights." if averaged else ""
    return (
        f"{weights} `{config.model}`, trained for {step} updates with online reinforcement learning "
        f"([Flow-GRPO](https://arxiv.org/abs/2505.05470)) by FastFlowGRPO. Rewards: {rewards}.{average}\n\n"
        "Whoever publishes these weights chooses their licence; the licence of the base model applies to them too."
    )


def _evaluation(run: Path, step: int) -> str:
    """A table of the run's first evaluation and its last one up to a step; "" if there is none yet."""
    rows = [row for row in read_rows(run / METRICS) if "eval" in row and row["step"] <= step]
    if not rows:
        return ""
    first, last = ({**row["eval"], **row["eval"]["scores"]} for row in (rows[0], rows[-1]))
    names = [name for name in first if name not in ("scores", "images", "missing")]
    cells = {name: [value.get(name) for value in (first, last)] for name in names}
    lines = [f"| | before | after {rows[-1]['step']} updates |", "|-|-:|-:|"]
    lines += [
        f"| {name} | {' | '.join('-' if value is None else f'{value:.3f}' for value in pair)} |"
        for name, pair in cells.items()
    ]
    counts = f"{last['images']} images each; without a score: {first['missing']} before, {last['missing']} after."
    return "\n".join(["## Evaluation", "", *lines, "", counts])


def _use(config: Config, checkpoint: Path) -> str:
    """Code that loads the weights and draws an image as the evaluations did."""
    if config.model == "shapes_edit":
        return ""  # diffusers has no pipeline that gives this transformer its source
    index, rollout = _index(config), config.rollout
    model = "PIPELINE" if config.model == "shapes" else repr(config.model)
    absent = [name for name, value in index.items() if isinstance(value, list) and value[0] is None]
    options = [f"dtype=torch.{config.policy.dtype}", *(f"{name}=None" for name in absent)]
    loader = _pipeline(config) if config.policy.image_to_video else "DiffusionPipeline"
    lines = ["import torch"]
    if (checkpoint / LORA).is_file():
        lines += [f"from diffusers import {loader}"]
        load = [f'pipe.load_lora_weights("{PLACE}")']
        if (checkpoint / LORA_2).is_file():
            load += [f'pipe.load_lora_weights("{PLACE}", weight_name="{LORA_2}", load_into_transformer_2=True)']
    else:
        kind = json.loads((checkpoint / FULL / "config.json").read_text())["_class_name"]
        lines += [f"from diffusers import {loader}, {kind}"]
        options += [
            f'{name}={kind}.from_pretrained("{PLACE}", subfolder="{name}", dtype=torch.{config.policy.dtype})'
            for name in (FULL, FULL_2)
            if (checkpoint / name).is_dir()
        ]
        load = []
    if config.model == "shapes":
        lines.append("from fastflowgrpo.shapes import PIPELINE")
    family, guidance = FAMILIES[_pipeline(config)], config.evaluation_guidance
    scale, scale_2 = guidance if isinstance(guidance, tuple) else (guidance, None)
    length = config.policy.max_sequence_length
    if length is None and family.default_sequence_length(absent) == 0:
        length = 0  # the pipeline would append zero tokens
    arguments: dict[str, Any] = {
        "num_inference_steps": config.evaluation.num_steps,
        **family.guidance_arguments(config.policy, scale),
        "guidance_scale_2": scale_2,
        "height": rollout.height,
        "width": rollout.width,
        "num_frames": rollout.num_frames,
        "max_sequence_length": length,
    }
    given = "".join(f", {name}={json.dumps(value)}" for name, value in arguments.items() if value is not None)
    inputs = ("", "image=source_image, ", "image=source_images, ")[min(_num_sources(config), 2)] + "prompt=prompt"
    call = f"pipe({inputs}{given})"
    lines += [
        "",
        f"pipe = {loader}.from_pretrained(",
        *(f"    {argument}," for argument in (model, *options)),
        ")",
        *load,
        f"video = {call}.frames[0]" if family.makes_videos else f"image = {call}.images[0]",
    ]
    return "\n".join(["## Use", "", "```python", *lines, "```"])


def _num_sources(config: Config) -> int:
    """The source images of a prompt, as far as the model and the file of prompts tell."""
    if config.model == "shapes_edit":
        return 1
    family = FAMILIES[_pipeline(config)]
    try:
        return sources_per_prompt(family, config)
    except UserError:  # the run's prompts are not on this machine
        return int(family.edits_images)


def _recipe(config: Config) -> str:
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_IN_RECIPE}
    for reward in settings["rewards"].values():
        for key in PRIVATE_REWARD_SETTINGS if isinstance(reward, dict) else ():
            reward.pop(key, None)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return f"## Recipe\n\nSettings of `python -m fastflowgrpo.train --config`:\n\n```yaml\n{text}```"


def _versions() -> str:
    return "## Versions\n\n" + ", ".join(f"{package} {number}" for package, number in versions().items())


def _pipeline(config: Config) -> str:
    return pipeline_of(config.model, _index(config), config.policy)


def _index(config: Config) -> dict[str, Any]:
    """The model_index.json of the base pipeline."""
    return DiffusionPipeline.load_config(str(BUNDLED.get(config.model, config.model)))
