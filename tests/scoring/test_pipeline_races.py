"""Happens-before in the scoring of a GPU: the real pipeline and rollout loop on pretended streams, without a GPU."""

import ast
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.fake_gpu import CUDA, FakeGpu

from fastflowgrpo.config import Config, RolloutConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import WeightedRewards
from fastflowgrpo.sampling.rollout import Trajectory
from fastflowgrpo.scoring import pipeline
from fastflowgrpo.scoring.epoch import EpochSampler

PROMPTS = [Prompt("a", {})]
COPIES = 2
ORDERING = ("wait_stream", "wait_event", "synchronize", "record_stream")


class Calls(ast.NodeTransformer):
    """Finds the calls that order streams, and removes the one with this number."""

    def __init__(self, removed: int | None = None):
        self.removed, self.found = removed, []

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        called = getattr(node.value, "func", None)
        if isinstance(called, ast.Attribute) and called.attr in ORDERING:
            self.found.append(ast.unparse(node))
            if len(self.found) - 1 == self.removed:
                return ast.copy_location(ast.Pass(), node)
        return node


def source() -> ast.Module:
    return ast.parse(Path(pipeline.__file__).read_text())


def calls() -> list[str]:
    finder = Calls()
    finder.visit(source())
    return finder.found


def pipeline_without(number: int | None) -> ModuleType:
    """The module, without one of the calls."""
    module = ModuleType("pipeline_without")
    exec(compile(Calls(number).visit(source()), pipeline.__file__, "exec"), module.__dict__)
    return module


def decode(latents: torch.Tensor) -> torch.Tensor:
    """The decoding of a policy, whose VAE only makes the latents larger."""
    vae = SimpleNamespace(dtype=torch.float32)
    policy = SimpleNamespace(
        config=SimpleNamespace(decode_batch_size=1),
        pipeline=SimpleNamespace(vae=vae),
        _on_device=lambda *modules: nullcontext(),
        decode_batch=lambda batch: batch.repeat(1, 3, 2, 2) / 100,
    )
    return DiffusersPolicy.decode(policy, latents)


def on_gpu(gpu, fail=False):
    def reward(batch):
        with gpu.active():
            levels = batch.images.float().mean((1, 2, 3))
            if fail:
                raise ValueError("after its kernels began")
            return levels.cpu()

    reward.device = CUDA
    return reward


def on_cpu(gpu, error=None):
    def reward(batch):
        with gpu.active():
            if error is not None:
                raise error
            return batch.images.float().mean((1, 2, 3)).clone()

    return reward


def scoring(module, **rewards):
    return module.Scoring(WeightedRewards(rewards, dict.fromkeys(rewards, 1.0)), decode, CUDA)


def latents() -> torch.Tensor:
    """New ones of the main stream; nothing else holds them."""
    return torch.full((COPIES, 1, 2, 2), 2.0, device=CUDA) * 10


def submit_and_look(scorer, batches=4):
    images = [scorer.submit(latents(), PROMPTS, COPIES) for _ in range(batches)]
    assert not scorer.finish().values.isnan().any()
    assert torch.cat(images).float().mean() == 153


def rewards_everywhere(module, gpu):
    submit_and_look(scoring(module, host=on_cpu(gpu), device=on_gpu(gpu)))


def rewards_on_the_cpu(module, gpu):
    submit_and_look(scoring(module, one=on_cpu(gpu), other=on_cpu(gpu)))


def rewards_on_the_gpu(module, gpu):
    submit_and_look(scoring(module, one=on_gpu(gpu), other=on_gpu(gpu)))


def a_reward_fails_after_its_kernels_began(module, gpu):
    scorer = scoring(module, fails=on_gpu(gpu, fail=True))
    for _ in range(4):
        scorer.submit(latents(), PROMPTS, COPIES)
    assert scorer.finish().values.isnan().all()


def the_run_is_interrupted(module, gpu):
    error = UserError("set the token")
    scorer = scoring(module, ends=on_cpu(gpu, error), device=on_gpu(gpu))
    scorer.submit(latents(), PROMPTS, COPIES)
    with pytest.raises(UserError):
        scorer.finish()


def epochs_of_the_trainer(module, gpu):
    """Two epochs and an evaluation after each, with a sampler whose trajectories have only clean latents."""

    def sample(starts, seeds, conditioning, unconditional, on_step):
        none = torch.zeros(COPIES, 0, device=CUDA)
        return Trajectory(none, none, none, torch.zeros(COPIES, 0), torch.zeros(COPIES, device=CUDA), latents(), none)

    rollout = RolloutConfig(group_size=COPIES, batch_size=COPIES, num_steps=1, ahead=2)
    epochs = EpochSampler(
        Config(epochs=2, rollout=rollout),
        SimpleNamespace(padded_rank_indices=range, count=1),
        SimpleNamespace(starts=lambda epoch, seeds: [0], sample=sample),
        lambda prompts: {"text": torch.zeros(len(prompts), 1, device=CUDA)},
        scoring(module, device=on_gpu(gpu)),
        prompts=lambda epoch: PROMPTS * 4,
        weights=nullcontext,
        phase=lambda name, batch=None: nullcontext(),
        num_shown=lambda epoch: 4,
    )
    for epoch, stale in ((0, 0), (1, 2)):
        sampled = epochs.sample(epoch, PROMPTS * 4)
        assert sampled.stale == stale * COPIES
        assert sampled.shown.float().mean() == sampled.scores.values.mean() == 153
        assert sampled.trajectory.final.cpu().mean() == 20
        assert len(sampled.shown) == len(sampled.scores.values) == len(sampled.trajectory.final) == 4 * COPIES
        with epochs.scoring.set_aside():
            submit_and_look(epochs.scoring, batches=1)


SCENARIOS = (
    rewards_everywhere,
    rewards_on_the_cpu,
    rewards_on_the_gpu,
    a_reward_fails_after_its_kernels_began,
    the_run_is_interrupted,
    epochs_of_the_trainer,
)


def races(scenario, removed: int | None = None) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        module = pipeline_without(removed)
        gpu = FakeGpu(patch, module)
        with gpu.active():
            scenario(module, gpu)
        assert gpu.errors == []
        return gpu.races


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_races(scenario, capsys):
    assert races(scenario) == []


@pytest.mark.parametrize("number", range(len(calls())), ids=calls())
def test_a_call_that_orders_streams_is_missed(number, capsys):
    assert [race for scenario in SCENARIOS for race in races(scenario, number)]


def test_every_call_that_orders_streams_is_removed_once():
    """A call that is part of a larger statement would not be found."""
    written = Path(pipeline.__file__).read_text()
    assert len(calls()) == sum(written.count(f".{name}(") for name in ORDERING) > 0
