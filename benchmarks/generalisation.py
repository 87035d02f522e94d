"""What training carries over to held-out contents of the bundled world: `python -m benchmarks.generalisation --help`.

For each content of a tag, the strict accuracy of the base model, of runs' last weights, and of a supervised control:
the base model's transformer, trained by flow matching on true images of the same training prompts, with the same mix
of tags and the same frozen text encoders. No reward and no policy gradient is involved in the control, so what it does
not carry over either is a matter of the prompts or the model. --mix S gives a run's weights the share S and the base
model's the rest, S > 1 goes beyond: what falls as S grows is lost by training, whatever the run gains elsewhere.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastflowgrpo.config import Config, PolicyConfig
from fastflowgrpo.console import progress
from fastflowgrpo.evaluation.sampling import sample_and_score
from fastflowgrpo.learning.flow_matching import NoisyLatents
from fastflowgrpo.policy import Policy, load_policy
from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.trained import load_trained
from fastflowgrpo.prompts import TAGS, Prompt, epoch_prompts
from fastflowgrpo.prompts.geneval import MIX
from fastflowgrpo.rewards import build_rewards
from fastflowgrpo.runs.checkpoints import last_checkpoint
from fastflowgrpo.scoring.pipeline import Scoring
from fastflowgrpo.shapes.scenes import EVAL_WORDING, eval_prompts, render, sample_scene, train_prompts

DEVICE = torch.device("cpu")
PAIRS = 256  # of an image and its prompt, in a step of the control


def contents(tag: str) -> tuple[list[Prompt], list[Prompt]]:
    """The training and the held-out prompts of a tag in the wording of the evaluation, each content once."""
    trained = [p for p in train_prompts() if p.metadata["tag"] == tag and p.text.startswith(EVAL_WORDING)]
    held_out = {p.text: p for p in eval_prompts() if p.metadata["tag"] == tag}
    return trained, list(held_out.values())


def accuracies(policy: Policy, prompts: list[Prompt], images: int) -> list[float]:
    """Strict accuracy of each prompt over that many images of 40 ODE steps, whose noise no evaluation of a run has."""
    scoring = Scoring(build_rewards(Config().rewards), policy.decode, policy.device, 1)
    samples = sample_and_score(
        policy,
        EmbeddingCache(policy, None),
        scoring,
        list(enumerate(prompts)),
        policy.latent_shape(None, None),
        num_steps=40,
        images_per_prompt=images,
        batch_size=288,
        seed=1,
    )
    return samples.scores.details["geneval/strict"].view(-1, images).mean(1).tolist()


def encode(policy: DiffusersPolicy, prompts: list[Prompt], step: int, generator: torch.Generator) -> Tensor:
    """Latents of a new true image of each prompt, (N, ...)."""
    vae, rng = policy.pipeline.vae, np.random.default_rng(step)
    pixels = torch.from_numpy(render([sample_scene(prompt.metadata, rng) for prompt in prompts]))
    latents = vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.sample(generator)
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def train_supervised(policy: DiffusersPolicy, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train the transformer by flow matching on true images of the training prompts."""
    prompts, embed = train_prompts(), EmbeddingCache(policy, None)
    mix = {tag: weight for tag, weight in MIX.items() if tag in {prompt.metadata["tag"] for prompt in prompts}}
    for step in progress("supervised", steps):
        generator = torch.Generator().manual_seed(step)
        batch = [prompts[i] for i in epoch_prompts(prompts, PAIRS, step, 0, mix)]
        with torch.no_grad():
            clean = encode(policy, batch, step, generator)
            conditioning = embed([prompt.text for prompt in batch])
        noise, level = torch.randn(clean.shape, generator=generator), torch.rand(PAIRS, generator=generator)
        noisy = NoisyLatents(clean, noise, level, conditioning)
        noisy.error(noisy.velocity(policy)).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.trainable_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def mix(policy: DiffusersPolicy, base: DiffusersPolicy, share: float) -> None:
    """Give the transformer's weights the share, and the base model's the rest."""
    for parameter, of_base in zip(policy.module.parameters(), base.module.parameters(), strict=True):
        parameter.copy_(of_base.lerp(parameter, share))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs of the bundled model")
    parser.add_argument("--tag", choices=TAGS, default="counting")
    parser.add_argument("--images", type=int, default=96, help="of each content")
    parser.add_argument("--mix", type=float, nargs="*", default=[], help="shares of the runs' weights to measure too")
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="steps of the control after which to measure")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="of the control")
    arguments = parser.parse_args()
    trained, held_out = contents(arguments.tag)
    prompts = [*trained, *held_out]
    policy = load_policy("shapes", PolicyConfig(), DEVICE)
    assert isinstance(policy, DiffusersPolicy)
    columns = {"base": accuracies(policy, prompts, arguments.images)}
    for run, share in itertools.product(arguments.runs, [1.0, *arguments.mix]):
        run_policy = load_trained("shapes", Path(last_checkpoint(run)), PolicyConfig(), DEVICE)
        assert isinstance(run_policy, DiffusersPolicy)
        if share != 1:
            mix(run_policy, policy, share)
        name = Path(run).name + (f" x {share:g}" if share != 1 else "")
        columns[name] = accuracies(run_policy, prompts, arguments.images)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), arguments.learning_rate, weight_decay=1e-4, fused=True)
    for done, steps in itertools.pairwise([0, *sorted(arguments.steps)]):
        train_supervised(policy, optimizer, range(done, steps))
        columns[f"supervised {steps}"] = accuracies(policy, prompts, arguments.images)
    print("| |", " | ".join(columns), "|\n|-|" + "-:|" * len(columns))
    for i, prompt in enumerate(prompts):
        name = prompt.text.removeprefix(EVAL_WORDING).strip() + (", held out" if i >= len(trained) else "")
        print(f"| {name} |", " | ".join(f"{values[i]:.2f}" for values in columns.values()), "|")
    for name, part in (("training", slice(len(trained))), ("held out", slice(len(trained), None))):
        print(f"| mean, {name} |", " | ".join(f"{np.mean(values[part]):.3f}" for values in columns.values()), "|")


if __name__ == "__main__":
    main()
