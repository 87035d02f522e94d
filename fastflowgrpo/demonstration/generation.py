"""Images of one prompt by the base model and by trained weights, from the same noise, and their scores."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastflowgrpo.config import DemoConfig, Dynamics, RolloutConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy import Policy, load_policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.trained import load_trained
from fastflowgrpo.policy.weights import holds_weights
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import build_rewards
from fastflowgrpo.rewards.models import choose_device
from fastflowgrpo.runs.checkpoints import list_checkpoints
from fastflowgrpo.sampling.coefficients import check_dynamics, step_coefficients
from fastflowgrpo.sampling.groups import GroupSampler
from fastflowgrpo.sampling.rollout import sample_seeds
from fastflowgrpo.scoring.contract import Scores
from fastflowgrpo.scoring.pipeline import Scoring
from fastflowgrpo.scoring.weighted import WeightedRewards

MAX_PROMPT = 1000  # characters
MAX_SEED = 2**32 - 1
CACHED_PROMPTS = 64


@dataclass(frozen=True)
class Request:
    """What a visitor asks for."""

    prompt: str
    seed: int
    """Seed of all noise; k gives the noise of prompt number k, from 0, in an evaluation with seed 0."""
    num_images: int
    num_steps: int
    guidance_scale: float
    dynamics: Dynamics
    """The last step is an ODE step, as in training."""
    noise_level: float
    rewards: Sequence[str]
    """Names of the rewards that score the images."""
    checkpoint: str | None = None
    """Name of the trained weights, one of `Demo.checkpoints()`; None if there are none."""


@dataclass(frozen=True)
class Images:
    """The images of one model."""

    pixels: Tensor
    """uint8 (N, 3, H, W) on the CPU; of a video the middle frame."""
    scores: dict[str, Tensor]
    """Each reward and its details, "name" and "name/detail", as an evaluation names them: float32 (N,)."""


@dataclass(frozen=True)
class Comparison:
    """The answer to a request."""

    columns: dict[str, Images]
    """The images of "base" and, if there are trained weights, of "trained"."""
    not_scored: dict[str, str]
    """For each reward that gave no score to some image, why."""


class Demo:
    """Draws what visitors ask for, one request at a time. The model is loaded once; a checkpoint replaces its trained
    weights.

    Args:
        config: the limits and the size of the images, and where checkpoints are.
        policy: with the trained weights of the last checkpoint, if there is one.
        loaded: the name of these weights.
        prompts: known prompts by text; they lend a visitor's prompt their metadata.
        rewards: what can score the images.
    """

    def __init__(
        self,
        config: DemoConfig,
        policy: Policy,
        loaded: str | None,
        prompts: Mapping[str, Prompt],
        rewards: WeightedRewards,
    ):
        self.config, self.policy, self.loaded, self.prompts = config, policy, loaded, prompts
        self.shape = policy.latent_shape(config.height, config.width, config.num_frames)
        self.embed = EmbeddingCache(policy, size=CACHED_PROMPTS)
        # Each reward has its own, because it depends on the prompt which of them can score. They get decoded images.
        self.scoring = {
            name: Scoring(WeightedRewards({name: reward}, {name: 1.0}), _decoded, policy.device, config.reward_frames)
            for name, reward in rewards.rewards.items()
        }
        self.lock = threading.Lock()

    @classmethod
    def load(cls, config: DemoConfig, prompts: Mapping[str, Prompt]) -> "Demo":
        """Load the model, the newest of its checkpoints and the rewards.

        Raises:
            UserError: a setting, a file or the model is wrong.
        """
        try:
            rewards = build_rewards(config.rewards)
        except ValueError as error:
            raise UserError(str(error)) from error
        device, known = choose_device(None), _checkpoints(config)
        if config.run is not None and not known:
            raise UserError(f"run {config.run} has no checkpoint yet")
        loaded = next(reversed(known), None)
        folder = None if loaded is None else known[loaded]
        if folder is not None:
            policy = load_trained(config.model, folder, config.policy, device)
        elif loaded is not None:
            policy = load_policy(config.model, config.policy, device)
        else:  # the smallest adapter, which is never switched on, takes less memory than a second transformer
            policy = load_policy(config.model, replace(config.policy, lora_rank=1), device)
        if policy.edits_images:
            raise UserError(f'model "{config.model}" edits images, and the demo takes texts only: use evaluate')
        return cls(config, policy, loaded, prompts, rewards)

    def checkpoints(self) -> list[str]:
        """The names of the trained weights to choose from, the oldest first. A live run adds to them."""
        return list(_checkpoints(self.config))

    def generate(
        self, request: Request, on_step: Callable[[int, int], object] = lambda done, total: None
    ) -> Comparison:
        """Draw and score the images that a visitor asks for.

        Args:
            request: is checked here.
            on_step: called with the number of denoising steps done and their total, before the first one and after
                each. An exception that it raises ends the request.

        Raises:
            UserError: a value is out of its limits, or there is no such checkpoint or reward.
        """
        self.check(request)
        with self.lock:
            columns = ["base"] if request.checkpoint is None else ["base", "trained"]
            if request.checkpoint is not None:
                self._use(request.checkpoint)
            prompt = self.prompts.get(request.prompt.strip(), Prompt(request.prompt.strip()))
            rewards, not_scored = self._rewards_for(prompt, request.rewards)
            total, done = len(columns) * request.num_steps, 0

            def count_step() -> None:
                nonlocal done
                done += 1
                on_step(done, total)

            on_step(0, total)
            drawn = {}
            for column in columns:
                with self.policy.reference() if column == "base" else nullcontext():
                    latents = self._sample(prompt, request, count_step)
                drawn[column], errors = self._score(latents, prompt, request.num_images, rewards)
                not_scored |= errors
            return Comparison(drawn, not_scored)

    def check(self, request: Request) -> None:
        """Raise a UserError that names the first value of a request that is out of its limits."""
        limits = {
            "seed": (request.seed, 0, MAX_SEED),
            "number of images": (request.num_images, 1, self.config.max_images),
            "steps": (request.num_steps, 1, self.config.max_steps),
            "guidance": (request.guidance_scale, 0, 100),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise UserError(f"{name}: must be from {low} to {high}, got {value}")
        if not request.prompt.strip():
            raise UserError("prompt: is empty")
        if len(request.prompt) > MAX_PROMPT:
            raise UserError(f"prompt: has {len(request.prompt)} characters, at most {MAX_PROMPT} are allowed")
        try:
            check_dynamics(request.dynamics, request.noise_level)
        except ValueError as error:
            raise UserError(str(error)) from error
        if request.checkpoint is None and self.checkpoints():
            raise UserError(f"checkpoint: choose one of {', '.join(self.checkpoints())}")
        if unknown := set(request.rewards) - self.scoring.keys():
            raise UserError(f"rewards: no {', '.join(sorted(unknown))}, there are {', '.join(self.scoring)}")

    def _use(self, name: str) -> None:
        """Replace the trained weights, unless they are loaded already."""
        known = _checkpoints(self.config)
        if name not in known:
            raise UserError(f"checkpoint: there is no {name}, or it was deleted; reload the page")
        folder = known[name]
        if name != self.loaded and folder is not None:
            self.loaded = None  # until they are complete
            self.policy.load(folder)
            self.loaded = name

    def _rewards_for(self, prompt: Prompt, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """The rewards among `names` that can score a prompt, and why the others cannot."""
        able, reasons = [], {}
        for name in names:
            try:
                self.scoring[name].rewards.check_prompts([prompt])
                able.append(name)
            except ValueError as error:
                reasons[name] = str(error).removeprefix(f"rewards.{name}: ")
        return able, reasons

    def _sample(self, prompt: Prompt, request: Request, on_step: Callable[[], object]) -> Tensor:
        """Clean latents (N, ...) with the policy's present weights."""
        conditioning = self.embed([prompt.text])
        unconditional = self.embed([""]) if request.guidance_scale != 1 else None
        rollout = RolloutConfig(
            group_size=request.num_images,
            num_steps=request.num_steps,
            guidance_scale=request.guidance_scale,
            dynamics=request.dynamics,
            noise_level=request.noise_level,
            window_size=None,
        )
        sigmas = self.policy.sigmas(rollout.num_steps, self.shape)
        coefficients = step_coefficients(sigmas, rollout.dynamics, rollout.noise_level)
        unused = {"keep_steps": False, "keep_velocities": False, "equal_passes": False}
        sampler = GroupSampler(rollout, self.policy, coefficients, self.shape, **unused)
        seeds = sample_seeds([request.seed], rollout.group_size)
        return sampler.sample([0], seeds, conditioning, unconditional, on_step).final

    def _score(
        self, latents: Tensor, prompt: Prompt, count: int, rewards: Sequence[str]
    ) -> tuple[Images, dict[str, str]]:
        """The images with their scores, and an error for each reward that did not score all of them."""
        images = self.policy.decode(latents)
        for name in rewards:
            self.scoring[name].submit(images, [prompt], count)
        finished = {name: _finish(self.scoring[name]) for name in rewards}
        scores = {key: values for own in finished.values() for key, values in own.details.items()}
        shown = images if images.ndim == 4 else images[:, images.shape[1] // 2]
        errors = {name: own.error.removeprefix(f"reward {name}: ") for name, own in finished.items() if own.error}
        return Images(shown.cpu(), scores), errors


def _decoded(images: Tensor) -> Tensor:
    return images


def _finish(scoring: Scoring) -> Scores:
    """The scores of a reward. A UserError, which would end a run, is a missing score here."""
    try:
        return scoring.finish()
    except UserError as error:
        return Scores(torch.empty(0), error=str(error))


def _checkpoints(config: DemoConfig) -> dict[str, Path | None]:
    """The folder of each choice of trained weights, the newest last; None for the LoRA that the policy begins with."""
    if config.checkpoint is not None:
        folder = Path(config.checkpoint)
        return {folder.name: folder}
    if config.run is not None:
        return {folder.name: folder for folder in list_checkpoints(config.run) if holds_weights(folder)}
    return {} if config.policy.lora is None else {config.policy.lora: None}
