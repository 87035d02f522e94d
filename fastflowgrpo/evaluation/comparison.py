"""Evaluating a model, its trained weights, or both on the same prompts and noise, and what is written about it."""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from fastflowgrpo.config import Config, EvaluateConfig, read_run
from fastflowgrpo.distributed import Processes, make_accelerator
from fastflowgrpo.errors import UserError
from fastflowgrpo.evaluation.pictures import image_grid
from fastflowgrpo.evaluation.sampling import diversity, sample_and_score
from fastflowgrpo.evaluation.statistics import Measures, Statistic, difference, measures, statistics
from fastflowgrpo.evaluation.summary import Evaluation
from fastflowgrpo.policy import Policy, load_policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.trained import load_trained
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.prompts.sources import evaluation_prompts, run_prompts
from fastflowgrpo.rewards import WeightedRewards, build_rewards
from fastflowgrpo.rewards.clip import CLIP
from fastflowgrpo.rewards.models import choose_device
from fastflowgrpo.runs.checkpoints import last_checkpoint
from fastflowgrpo.runs.files import finite, versions
from fastflowgrpo.scoring.gather import gather_scores
from fastflowgrpo.scoring.pipeline import Scoring

WRITTEN = ("evaluation.json", "evaluation.md", "grid.png")
Table = dict[str, dict[str, dict[str, Statistic]]]
"""Column (base, trained, difference) -> section -> row -> statistic."""


def evaluate(config: EvaluateConfig) -> Table:
    """Evaluate as `config` says, print the tables and write them, with a grid of images, into its output_dir.

    Of several processes each samples and scores its share of the prompts, and the first prints and writes.

    Raises:
        UserError: for everything that the user can put right, before anything is sampled.
    """
    begin = time.perf_counter()
    processes = Processes(make_accelerator([], config.output_dir))
    if processes.sharded:
        raise UserError("accelerate: an evaluation does not shard the model: use configs/accelerate/ddp.yaml")
    folder = Path(config.output_dir)
    processes.on_main(lambda: _check_output(folder, config.overwrite))
    checkpoint = _checkpoint(config)
    prompts, rewards = _prompts(config), _rewards(config)
    try:
        rewards.check_prompts(prompts)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        clip = None if config.diversity_model is None else CLIP(config.diversity_model)
    except ValueError as error:
        raise UserError(f"diversity_model: {error}") from error
    policy = _policy(config, checkpoint)
    shape = policy.latent_shape(config.height, config.width, config.num_frames)
    # Made before anything is sampled: a folder that cannot be made should not be found out last.
    folder.mkdir(parents=True, exist_ok=True)

    columns = ["base"] if checkpoint is None else ["base", "trained"] if config.weights == "both" else ["trained"]
    if processes.rank == 0:
        print(
            f"{config.model}{f', {checkpoint}' if checkpoint else ''}: {len(prompts)} prompts x "
            f"{config.images_per_prompt} images, {config.num_steps} steps, guidance {config.guidance_scale:g}, on "
            f"{policy.device}{f' and {processes.count - 1} more' if processes.count > 1 else ''}"
        )
    embed = EmbeddingCache(policy, config.policy.embeddings_dir)
    own = [(i, prompts[i]) for i in processes.padded_rank_indices(len(prompts))]
    if config.policy.embeddings_dir is not None:
        embed.prepare(["", *(prompt.text for _, prompt in own)])
    scoring = Scoring(rewards, policy.decode, policy.device, config.reward_frames)

    def measure(column: str) -> tuple[Measures, Evaluation]:
        with policy.reference() if column == "base" else nullcontext():
            samples = sample_and_score(
                policy,
                embed,
                scoring,
                own,
                shape,
                num_steps=config.num_steps,
                images_per_prompt=config.images_per_prompt,
                batch_size=config.batch_size,
                guidance_scale=config.guidance_scale,
                seed=config.seed,
            )
        scores = gather_scores(processes, samples.scores, len(prompts), samples.images_per_prompt)
        distances = diversity(samples, clip.embed_images if clip else None)
        distances = processes.gather_rows(distances, len(prompts))
        found = measures(prompts, samples.images_per_prompt, scores, distances, total=isinstance(config.rewards, dict))
        return found, Evaluation.of(prompts, samples.images, scores, samples.images_per_prompt, processes)

    results = {column: measure(column) for column in columns}
    measured = {column: found for column, (found, _) in results.items()}
    if len(columns) == 2:
        measured["difference"] = difference(measured["base"], measured["trained"])
    table = {column: statistics(sections) for column, sections in measured.items()}
    if processes.rank == 0:
        result = {
            "settings": asdict(config),
            "checkpoint": str(checkpoint) if checkpoint else None,
            "prompts": len(prompts),
            "images": len(prompts) * config.images_per_prompt,
            **{column: _plain(sections) for column, sections in table.items()},
            "processes": processes.count,
            "seconds": round(time.perf_counter() - begin, 3),
            "versions": versions(),
        }
        text = markdown(table)
        (folder / "evaluation.json").write_text(json.dumps(finite(result), indent=2, allow_nan=False) + "\n")
        (folder / "evaluation.md").write_text(_heading(config, checkpoint, len(prompts)) + text)
        image_grid([shown for _, shown in results.values()], columns).save(folder / "grid.png")
        print(f"\n{text}")
        for title, name in zip(("results", "tables", "images"), WRITTEN, strict=True):
            print(f"{title:<8} {folder / name}")
    processes.accelerator.end_training()
    return table


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file")
    if not overwrite and any((folder / name).exists() for name in WRITTEN):
        raise UserError(f"output_dir {folder} holds results already: give another, or --overwrite true")


def markdown(table: Table) -> str:
    """A table for each section, a row for each measure, a column for each evaluation: mean ± standard error."""
    columns = list(table)
    evaluated = [name for name in columns if name != "difference"]
    lines = []
    for title, rows in table[columns[0]].items():
        lines += [f"| {title} | {' | '.join(columns)} | missing |", f"|-|{'-:|' * (len(columns) + 1)}"]
        for row in rows:
            cells = [_cell(table[column][title][row], sign=column == "difference") for column in columns]
            counts = "/".join(str(table[column][title][row].missing) for column in evaluated)
            lines.append(f"| {row} | {' | '.join(cells)} | {counts} |")
        lines.append("")
    return "\n".join(lines)


def _cell(statistic: Statistic, sign: bool) -> str:
    if math.isnan(statistic.mean):
        return "-"
    mean = f"{statistic.mean:{'+' if sign else ''}.3f}"
    return mean if math.isnan(statistic.standard_error) else f"{mean} ± {statistic.standard_error:.3f}"


def _heading(config: EvaluateConfig, checkpoint: Path | None, prompts: int) -> str:
    about = {
        "model": config.model,
        "checkpoint": checkpoint,
        "prompts": f"{prompts}, {config.images_per_prompt} images each, seed {config.seed}",
        "sampling": f"{config.num_steps} ODE steps, guidance {config.guidance_scale:g}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    lines = [f"- {name}: {value}" for name, value in about.items() if value is not None]
    note = (
        "Mean ± standard error over prompts. An image without a score is counted as missing and takes no part in means."
    )
    return "\n".join([*lines, "", note, "", ""])


def _plain(sections: dict[str, dict[str, Statistic]]) -> dict[str, dict[str, dict[str, float]]]:
    return {title: {name: asdict(value) for name, value in rows.items()} for title, rows in sections.items()}


def _checkpoint(config: EvaluateConfig) -> Path | None:
    """The folder of the weights to evaluate; None if it is the model alone."""
    if config.weights == "base":
        return None
    if config.checkpoint is not None:
        return Path(config.checkpoint)
    if config.run is not None:
        return last_checkpoint(config.run)
    if config.weights == "trained":
        raise UserError("weights: trained needs a checkpoint or a run")
    return None


def _policy(config: EvaluateConfig, checkpoint: Path | None) -> Policy:
    """The policy, with the trained weights, inside whose `reference` it is the model as it was."""
    device = choose_device(None)
    if checkpoint is not None:
        return load_trained(config.model, checkpoint, config.policy, device)
    # The smallest adapter, not a second transformer: it is never on.
    return load_policy(config.model, replace(config.policy, lora=None, lora_rank=1), device)


def _prompts(config: EvaluateConfig) -> list[Prompt]:
    if config.prompts is None:
        return run_prompts(Config() if config.run is None else read_run(config.run))[1]
    return evaluation_prompts("prompts", config.prompts)


def _rewards(config: EvaluateConfig) -> WeightedRewards:
    named = config.rewards
    try:
        return build_rewards({name.strip(): 1.0 for name in named.split(",")} if isinstance(named, str) else named)
    except ValueError as error:
        raise UserError(str(error)) from error
