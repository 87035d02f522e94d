"""The command `evaluate`: measures a model, its trained weights or both, and writes the results."""

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastflowgrpo.config import Config, EvaluateConfig, read_run
from fastflowgrpo.distributed import Processes, make_accelerator
from fastflowgrpo.errors import UserError
from fastflowgrpo.evaluation.pictures import image_grid
from fastflowgrpo.evaluation.sampling import sample_and_score
from fastflowgrpo.evaluation.statistics import SectionStatistics, difference, statistics
from fastflowgrpo.evaluation.summary import Evaluation
from fastflowgrpo.evaluation.tables import Table, markdown
from fastflowgrpo.policy import Policy, load_policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.guidance import check_guidance
from fastflowgrpo.policy.source_images import check_source_images
from fastflowgrpo.policy.trained import load_trained
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.prompts.sources import evaluation_prompts, run_prompts
from fastflowgrpo.results import finite, versions
from fastflowgrpo.rewards import build_rewards
from fastflowgrpo.rewards.clip import CLIP
from fastflowgrpo.rewards.models import choose_device
from fastflowgrpo.scoring.pipeline import Scoring

RESULTS, TABLES, IMAGES = "evaluation.json", "evaluation.md", "grid.png"


@dataclass(frozen=True)
class _Loaded:
    """What an evaluation samples and scores with."""

    prompts: list[Prompt]
    policy: Policy
    shape: tuple[int, ...]
    """Shape of one latent sample."""
    embed: EmbeddingCache
    scoring: Scoring
    clip: CLIP | None


def evaluate(config: EvaluateConfig, checkpoint: Path | None) -> Table:
    """Evaluate as `config` says, print the tables, and write results, tables and a grid of images into its output_dir.

    Each rank samples and scores its share of the prompts; rank 0 prints and writes.

    Args:
        config: the settings. Its `run` and `checkpoint` do not choose the trained weights, the next argument does.
        checkpoint: folder of the trained weights; None evaluates the model alone.

    Raises:
        UserError: a setting, a file or the model is wrong. Raised before anything is sampled.
    """
    begin = time.perf_counter()
    processes = Processes(make_accelerator([], config.output_dir))
    if processes.sharded:
        raise UserError("accelerate: an evaluation does not shard the model: use configs/accelerate/ddp.yaml")
    folder = Path(config.output_dir)
    processes.on_main(lambda: _check_output(folder, config.overwrite))
    loaded = _load(config, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)  # before the sampling, which would be lost if it failed
    count = len(loaded.prompts)
    if processes.rank == 0:
        others = f" and {processes.count - 1} more" if processes.count > 1 else ""
        print(
            f"{config.model}{f', {checkpoint}' if checkpoint else ''}: {count} prompts x {config.images_per_prompt} "
            f"images, {config.num_steps} steps, {_guidance(config)}, on {loaded.policy.device}{others}"
        )
    columns = ["base"] if checkpoint is None else ["base", "trained"] if config.weights == "both" else ["trained"]
    evaluations = _measure(config, loaded, columns, processes)
    table = _compare(config, evaluations)
    if processes.rank == 0:
        results = {
            "settings": asdict(config),
            "checkpoint": str(checkpoint) if checkpoint else None,
            "prompts": count,
            "images": count * config.images_per_prompt,
            **{column: _as_dicts(sections) for column, sections in table.items()},
            "processes": processes.count,
            "seconds": round(time.perf_counter() - begin, 3),
            "versions": versions(),
        }
        _write(folder, results, _heading(config, checkpoint, count), table, evaluations)
    processes.accelerator.end_training()
    return table


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file")
    if not overwrite and any((folder / name).exists() for name in (RESULTS, TABLES, IMAGES)):
        raise UserError(f"output_dir {folder} holds results already: give another, or --overwrite true")


def _load(config: EvaluateConfig, checkpoint: Path | None) -> _Loaded:
    """Load the prompts, rewards and models, and check that they fit together."""
    if config.prompts is not None:
        prompts = evaluation_prompts("prompts", config.prompts)
    else:
        prompts = run_prompts(Config() if config.run is None else read_run(config.run))[1]
    try:
        rewards = build_rewards(config.rewards)
        rewards.check_prompts(prompts)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        clip = None if config.diversity_model is None else CLIP(config.diversity_model)
    except ValueError as error:
        raise UserError(f"diversity_model: {error}") from error
    device = choose_device(None)
    if checkpoint is not None:
        policy = load_trained(config.model, checkpoint, config.policy, device)
    else:  # the smallest adapter, which is never switched on, takes less memory than a second transformer
        policy = load_policy(config.model, replace(config.policy, lora=None, lora_rank=1), device)
    check_source_images(policy, prompts)
    check_guidance(policy, config.guidance)
    shape = policy.latent_shape(config.height, config.width, config.num_frames)
    return _Loaded(
        prompts=prompts,
        policy=policy,
        shape=shape,
        embed=EmbeddingCache(policy, config.policy.embeddings_dir, shape=shape),
        scoring=Scoring(rewards, policy.decode, policy.device, config.reward_frames),
        clip=clip,
    )


def _measure(
    config: EvaluateConfig, loaded: _Loaded, columns: list[str], processes: Processes
) -> dict[str, Evaluation]:
    """Evaluate each of the columns "base" and "trained". Collective."""
    prompts = loaded.prompts
    local_prompts = [(i, prompts[i]) for i in processes.padded_rank_indices(len(prompts))]
    if config.policy.embeddings_dir is not None:
        loaded.embed.prepare(["", *(prompt for _, prompt in local_prompts)])
    embed_images = None if loaded.clip is None else loaded.clip.embed_images
    evaluations = {}
    for column in columns:
        with loaded.policy.reference() if column == "base" else nullcontext():
            samples = sample_and_score(
                loaded.policy,
                loaded.embed,
                loaded.scoring,
                local_prompts,
                loaded.shape,
                num_steps=config.num_steps,
                images_per_prompt=config.images_per_prompt,
                batch_size=config.batch_size,
                guidance_scale=config.guidance,
                seed=config.seed,
            )
        evaluations[column] = Evaluation.of(prompts, samples, processes, embed_images)
    return evaluations


def _compare(config: EvaluateConfig, evaluations: dict[str, Evaluation]) -> Table:
    """The statistics of each evaluation, and the difference where there are two."""
    measured = {column: evaluation.measures for column, evaluation in evaluations.items()}
    if len(measured) == 2:
        measured["difference"] = difference(measured["base"], measured["trained"])
    table = {column: statistics(sections) for column, sections in measured.items()}
    if isinstance(config.rewards, str):  # without weights a sum of rewards has no meaning
        for sections in table.values():
            del sections["Scores"]["reward"]
    return table


def _write(
    folder: Path, results: dict[str, Any], heading: str, table: Table, evaluations: dict[str, Evaluation]
) -> None:
    """Write the files into the folder; print the tables and the paths."""
    text = markdown(table)
    (folder / RESULTS).write_text(json.dumps(finite(results), indent=2, allow_nan=False) + "\n")
    (folder / TABLES).write_text(heading + text)
    image_grid([evaluation.shown for evaluation in evaluations.values()], list(evaluations)).save(folder / IMAGES)
    print(f"\n{text}")
    for title, name in (("results", RESULTS), ("tables", TABLES), ("images", IMAGES)):
        print(f"{title:<8} {folder / name}")


def _heading(config: EvaluateConfig, checkpoint: Path | None, prompts: int) -> str:
    """The lines above the tables of evaluation.md."""
    about = {
        "model": config.model,
        "checkpoint": checkpoint,
        "prompts": f"{prompts}, {config.images_per_prompt} images each, seed {config.seed}",
        "sampling": f"{config.num_steps} ODE steps, {_guidance(config)}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    lines = [f"- {name}: {value}" for name, value in about.items() if value is not None]
    note = (
        "Mean ± standard error over prompts. Images without a score are counted as missing and left out of the means."
    )
    return "\n".join([*lines, "", note, "", ""])


def _guidance(config: EvaluateConfig) -> str:
    second = "" if config.guidance_scale_2 is None else f" and {config.guidance_scale_2:g}"
    return f"guidance {config.guidance_scale:g}{second}"


def _as_dicts(sections: SectionStatistics) -> dict[str, dict[str, dict[str, float]]]:
    return {title: {name: asdict(value) for name, value in rows.items()} for title, rows in sections.items()}
