"""Two transformers that share the noise levels: batches of both, windows on one side, saved weights, exports."""

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from support.pipelines import perturb, tiny_wan_experts_pipeline
from support.tiny_run import command, rows

from fastflowgrpo import Trainer, export, load_policy
from fastflowgrpo.config import PolicyConfig, parse
from fastflowgrpo.errors import UserError
from fastflowgrpo.kernels.sde_step import guided_velocity
from fastflowgrpo.planning.passes import run_passes
from fastflowgrpo.policy.weights import LORA, LORA_2
from fastflowgrpo.sampling.ode import sample_ode
from fastflowgrpo.train import main

SIZE = {"height": 16, "width": 16, "num_frames": 5}
VIDEO = {f"rollout.{key}": value for key, value in SIZE.items()} | {"policy.lora_alpha": 8}
SIGMA = torch.tensor([0.3, 0.9, 0.79, 0.81])
NOISY = SIGMA >= 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "model"
    tiny_wan_experts_pipeline().save_pretrained(folder)
    return folder


def load(folder, **settings):
    settings = {"max_sequence_length": 8, "lora_rank": 4, "lora_alpha": 8} | settings
    return load_policy(str(folder), PolicyConfig(**settings))


def inputs(policy):
    latents = torch.randn(4, *policy.latent_shape(**SIZE), generator=torch.Generator().manual_seed(2))
    return latents, SIGMA, policy.encode(["a cat", "two dogs", "snow", "a ball"])


def perturbed(policy):
    perturb(policy.trainable_parameters(), scale=0.2)
    return policy


def test_each_sample_passes_through_the_expert_of_its_noise_level(folder):
    policy = perturbed(load(folder))
    latents, sigma, conditioning = inputs(policy)
    velocity = policy.velocity(latents, sigma, conditioning)
    for transformer, own in ((policy.pipeline.transformer, NOISY), (policy.pipeline.transformer_2, ~NOISY)):
        arguments = {name: tensor[own] for name, tensor in conditioning.items()}
        (expected,) = transformer(latents[own], 1000 * sigma[own], return_dict=False, **arguments)
        torch.testing.assert_close(velocity[own], expected, rtol=1e-4, atol=1e-5)
    for own, idle in ((NOISY, "transformer_2"), (~NOISY, "transformer")):
        loss = policy.velocity(latents, sigma, conditioning)[own].square().sum()
        for parameter, gradient in zip(
            policy.trainable_parameters(), torch.autograd.grad(loss, policy.trainable_parameters()), strict=True
        ):
            is_idle = any(parameter is other for other in policy.transformers[idle].parameters())
            assert bool(gradient.any()) != is_idle
    one_side = policy.velocity(latents[:1], sigma[:1], {name: tensor[:1] for name, tensor in conditioning.items()})
    gradients = torch.autograd.grad(one_side.sum(), policy.trainable_parameters())
    assert sum(bool(gradient.any()) for gradient in gradients) == len(gradients) // 2  # zeros, not None


def test_a_lora_for_each_expert_is_saved_and_loaded(folder, tmp_path):
    policy = perturbed(load(folder))
    policy.save(tmp_path)
    again = load(folder, lora=str(tmp_path), lora_rank=None)
    with torch.no_grad():
        velocity = policy.velocity(*inputs(policy))
        assert torch.equal(again.velocity(*inputs(again)), velocity)
        with again.reference():
            reference = again.velocity(*inputs(again))
        assert (reference - velocity).abs().amax((1, 2, 3, 4)).min() > 0.01
        other = load(folder)
        other.load(tmp_path)
        assert torch.equal(other.velocity(*inputs(other)), velocity)
    with pytest.raises(UserError, match=r"is one file: this model takes a folder with .*weights\.saf.* and .*_2\.saf"):
        load(folder, lora=str(tmp_path / LORA), lora_rank=None)


def test_full_weights_of_both_experts_are_saved_and_loaded(folder, tmp_path):
    policy = perturbed(load(folder, lora_rank=0))
    policy.save(tmp_path)
    again = load(folder, lora_rank=0)
    again.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.velocity(*inputs(again)), policy.velocity(*inputs(policy)))
        with again.reference():
            assert not torch.equal(again.velocity(*inputs(again)), policy.velocity(*inputs(policy)))


@pytest.mark.parametrize(("start", "untrained"), [(0, "transformer_2"), (2, "transformer")])
def test_a_window_on_one_side_trains_that_expert(folder, tmp_path, capsys, start, untrained):
    # of the sigmas 1, 0.9, 0.75 and 0.5 two are on each side
    settings = VIDEO | {"rollout.window_size": 1, "rollout.window_start": f"[{start},{start + 1}]"}
    settings |= {"rollout.guidance_scale": 3, "rollout.guidance_scale_2": 2}
    trainer = Trainer(parse(command(folder, tmp_path / "run", **settings)))
    assert f"two transformers: {untrained} is not trained; rollout.window_start" in capsys.readouterr().err
    assert {name.split(".")[0] for name in trainer.learner.named_parameters()} ^ {untrained} == {
        "transformer",
        "transformer_2",
    }
    trainer.run()
    saved = tmp_path / "run/checkpoints/checkpoint-4"
    moved = {
        name: any(tensor.any() for key, tensor in load_file(saved / file).items() if "lora_B" in key)
        for name, file in (("transformer", LORA), ("transformer_2", LORA_2))
    }
    assert moved == {"transformer": True, "transformer_2": True} | {untrained: False}
    card = (saved / "README.md").read_text()
    assert "load_into_transformer_2=True" in card and "guidance_scale=3.0, guidance_scale_2=2.0" in card


def test_a_second_guidance_scale_is_for_two_transformers(tiny_sd3_folder, tmp_path):
    scales = {"rollout.guidance_scale": 3, "rollout.guidance_scale_2": 2}
    evaluated = {"rollout.guidance_scale": 3, "evaluation.guidance_scale_2": 2}
    for i, settings in enumerate((scales, evaluated)):
        config = parse(command(tiny_sd3_folder, tmp_path / str(i), **settings))
        for use in (Trainer, lambda config: run_passes(config, 1, 1, 1)):
            with pytest.raises(UserError, match=r"^guidance_scale_2: this model has one transformer, .*leave it out$"):
                use(config)


def test_the_ratio_of_a_batch_of_both_experts_is_one(folder, tmp_path):
    """The windows of two groups lie on different sides, and are sampled together."""
    settings = VIDEO | {"rollout.window_size": 1, "rollout.window_start": "[0,3]", "rollout.tail_steps": 4}
    settings |= {"policy.dtype": "bfloat16", "update.algorithm": "grpo_guard"}
    settings |= {"rollout.guidance_scale": 3, "rollout.guidance_scale_2": 1.5, "rollout.keep_unconditional": True}
    trainer = Trainer(parse(command(folder, tmp_path / "run", **settings)))
    assert len({name.split(".")[0] for name in trainer.learner.named_parameters()}) == 2
    perturb(trainer.learner.parameters, scale=0.2)
    trainer.sampler.starts = lambda epoch, seeds: [0, 2]
    batch, _ = trainer.collect(0)
    batch.advantages = torch.ones(8)
    ((pair_rows, slots),) = trainer.objective.micro_batches(batch, 0, 8)
    loss, statistics = trainer.objective.loss(batch, pair_rows, slots)
    trainer.accelerator.end_training()
    assert len(loss) == 8 and (statistics["ratio"] == 1).all()
    for group, step, scale in ((slice(0, 4), 0, 3), (slice(4, 8), 2, 1.5)):
        sigma, conditioning = trainer.coefficients.sigma[step].expand(4), batch.conditioning
        own = {name: tensor[step // 2].expand(4, *tensor.shape[1:]) for name, tensor in conditioning.items()}
        with torch.no_grad():
            velocity = trainer.policy.velocity(batch.trajectory.latents[group, 0], sigma.float(), own)
        guided = guided_velocity(velocity, batch.trajectory.unconditional[group, 0], scale)
        torch.testing.assert_close(batch.trajectory.velocities[group, 0], guided, rtol=0.02, atol=0.02)


def test_a_resumed_run_equals_an_unbroken_one(folder, tmp_path):
    settings = VIDEO | {"rollout.window_size": 3, "rollout.window_start": "[0,1]", "update.ema_every": 1}
    settings |= {"evaluation.num_steps": 1, "evaluation.images_per_prompt": 1, "save_every": 1}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command(folder, whole, **settings)) == 0
    assert main(command(folder, broken, **settings | {"epochs": 1})) == 0
    assert main([*command(folder, broken, **settings), "--resume", "latest"]) == 0
    one, other = ([row for row in rows(run) if "eval" not in row] for run in (whole, broken))
    assert one == other
    for file in (LORA, LORA_2, f"raw/{LORA}", f"raw/{LORA_2}"):
        one, other = (load_file(run / "checkpoints/checkpoint-4" / file) for run in (whole, broken))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert any(tensor.any() for key, tensor in one.items() if "lora_B" in key)


@pytest.mark.parametrize("form", ["kohya", "merged"])
def test_an_exported_run_draws_its_videos(folder, tmp_path, form):
    run, checkpoint = tmp_path / "run", tmp_path / "run/checkpoints/checkpoint-4"
    targets = "[to_q,to_k,to_v,to_out.0,ffn.net.0.proj,ffn.net.2]"  # what diffusers' converter of kohya's asks for
    trainer = Trainer(parse(command(folder, run, **VIDEO, **{"policy.lora_targets": targets})))
    trainer.accelerator.end_training()
    trainer.lock.close()
    policy = perturbed(trainer.policy)
    policy.save(checkpoint)
    noise, conditioning = inputs(policy)[0], inputs(policy)[2]
    expected = sample_ode(policy, conditioning, 3, noise)
    output = tmp_path / ("lora.safetensors" if form == "kohya" else "merged")
    dtype = ["--dtype", "float32"] if form == "merged" else []
    assert export.main([str(run), "--format", form, "--output", str(output), *dtype]) == 0
    if form == "merged":
        pipe = WanPipeline.from_pretrained(output)
    else:
        pipe = WanPipeline.from_pretrained(folder)
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
        pipe.load_lora_weights(tmp_path / "lora_2.safetensors", load_into_transformer_2=True)
    for name, transformer in policy.transformers.items():
        policy.module.register_module(name, getattr(pipe, name))
        assert transformer is not getattr(policy.module, name)
    torch.testing.assert_close(sample_ode(policy, conditioning, 3, noise), expected, rtol=1e-3, atol=1e-3)
