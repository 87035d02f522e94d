"""Every model family through the same tests: the diffusers pipeline's own images, ratio 1, training, saved weights."""

import math
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partialmethod
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin, UniPCMultistepScheduler, WanPipeline
from diffusers.models import attention_processor
from safetensors.torch import load_file, save_file
from support.families import GENERATING, TEXTS, VIDEO, assert_same_images, load_loras, pipeline_images
from support.pipelines import perturb, tiny_flux2_klein_pipeline, tiny_flux_pipeline, tiny_wan_pipeline
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from fastflowgrpo import Config, Trainer, load_policy
from fastflowgrpo.config import EvaluationConfig, PolicyConfig, PromptsConfig, RolloutConfig, UpdateConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.learning.learner import concatenate
from fastflowgrpo.policy import base, sd3
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.experts import Experts
from fastflowgrpo.policy.flux import FluxPolicy
from fastflowgrpo.policy.latents import pack, unpack
from fastflowgrpo.policy.weights import LORA, LORA_2
from fastflowgrpo.prompts import load_prompts
from fastflowgrpo.runs.report import Report
from fastflowgrpo.sampling.conditioning import repeat_rows
from fastflowgrpo.sampling.ode import sample_ode
from fastflowgrpo.sampling.rollout import sample_seeds
from fastflowgrpo.train import main

# These differ little from sd35, wan and klein, and get each test once.
SIMILAR = ["sd35_large", "wan22", "i2v_experts", "i2v_wan22", "flux2"]
# So do these, of which test_experts.py and test_image_to_video.py have more.
ELSEWHERE = ["experts", "i2v"]
TESTED = [name for name in GENERATING if name not in ELSEWHERE]
WITH_DISPATCHER = [name for name in TESTED if not name.startswith("sd35")]  # of attention


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("families") / name
            GENERATING[name].save(made[name])
        return made[name]

    return folder


def each(for_distinct, for_similar, names=TESTED):
    """The arguments of a test for each family."""
    arguments = {name: for_distinct if name not in SIMILAR + ELSEWHERE else for_similar for name in names}
    return [(name, *of_one) for name, several in arguments.items() for of_one in several]


def load(folder, **settings):
    length = GENERATING[folder.name].length if folder.name in GENERATING else 12
    settings = {"max_sequence_length": length, "lora_rank": 4, "lora_alpha": 8, **settings}
    return load_policy(str(folder), PolicyConfig(**settings))


def prompts_of(policy, name):
    return load_prompts(str(GENERATING[name].prompts(Path(policy.pipeline.name_or_path))))


def embed(policy, name):
    """The conditioning of the family's prompts, and the empty prompt's."""
    cache = EmbeddingCache(policy, shape=policy.latent_shape(**GENERATING[name].size))
    return cache(prompts_of(policy, name)), cache([""])


def noise_of(policy, name, count, seed=2):
    shape = policy.latent_shape(**GENERATING[name].size)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def inputs(policy, name):
    conditioning, _ = embed(policy, name)
    return noise_of(policy, name, len(TEXTS)).to(policy.dtype), torch.tensor([0.9, 0.7, 0.5]), conditioning


# velocity, schedule and decoding


@pytest.mark.parametrize(
    ("name", "guidance"),
    # FLUX.2 dev's pipeline has no classifier-free guidance, those of two transformers have a scale for each
    [(name, guidance) for name in GENERATING for guidance in (1.0, 4.5) if (name, guidance) != ("flux2", 4.5)]
    + [("experts", (4.5, 2.0)), ("i2v_experts", (4.5, 2.0))],
)
def test_ode_samples_are_the_pipelines_own_images(folders, name, guidance):
    policy = load(folders(name))
    noise, (conditioning, empty) = noise_of(policy, name, 2, seed=3), embed(policy, name)
    unconditional = empty if guidance != 1 else None
    conditioning = {key: tensor[:2] for key, tensor in conditioning.items()}
    latents = sample_ode(policy, conditioning, 4, noise, unconditional=unconditional, guidance_scale=guidance)
    pipe, prompts = DiffusionPipeline.from_pretrained(folders(name)), prompts_of(policy, name)[:2]
    assert_same_images(policy.decode(latents), pipeline_images(pipe, GENERATING[name], noise, prompts, 4, guidance))


@pytest.mark.parametrize("name", GENERATING)
def test_example_conditioning_is_shaped_like_embeddings(folders, name):
    policy, family = load(folders(name), dtype="bfloat16"), GENERATING[name]
    example = policy.example_conditioning(len(TEXTS))
    if family.sources:
        example = policy.example_edit(len(TEXTS), policy.latent_shape(**family.size), family.sources)
    found, encoded = (
        {key: (tensor.shape, tensor.dtype) for key, tensor in conditioning.items()}
        for conditioning in (example, embed(policy, name)[0])
    )
    assert found == encoded


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", TESTED)
def test_vae_and_text_encoders_have_dtypes_of_their_own(folders, name):
    single, half, mixed = (
        load(folders(name), dtype=dtype, **other)
        for dtype, other in (
            ("float32", {}),
            ("bfloat16", {"vae_dtype": "bfloat16"}),
            ("bfloat16", {"text_encoder_dtype": "float32"}),
        )
    )
    assert mixed.pipeline.transformer.dtype == mixed.dtype == torch.bfloat16
    embeddings, expected = mixed.encode(TEXTS), single.encode(TEXTS)
    for key, tensor in embeddings.items():  # computed in float32, then rounded
        assert torch.equal(tensor, expected[key].to(tensor.dtype)) and tensor.dtype != torch.float32
    assert any(not torch.equal(tensor, embeddings[key]) for key, tensor in half.encode(TEXTS).items())
    latents = inputs(mixed, name)[0]
    assert torch.equal(mixed.decode(latents), single.decode(latents))  # not rounded on the way
    coarse = half.decode(latents).int()
    assert 0 < (coarse - single.decode(latents).int()).abs().max() <= 8
    assert mixed.velocity(latents, *inputs(mixed, name)[1:]).dtype == torch.bfloat16


def test_packed_latents_are_diffusers_own():
    latents = torch.randn(2, 4, 6, 10)
    pipe = tiny_flux_pipeline()
    assert torch.equal(pack(latents), pipe._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpack(pack(latents), 6, 10), latents)


@pytest.mark.parametrize("name", ["flux", "qwen", "klein"])
def test_the_schedule_is_shifted_by_the_number_of_tokens(folders, name):
    policy = load(folders(name))
    small, large = policy.sigmas(4, (4, 8, 8)), policy.sigmas(4, (4, 128, 128))
    assert small[0] == large[0] == 1
    assert small[-1] == large[-1] == 0
    assert (large[1:3] > small[1:3] + 0.02).all()


def test_wan_takes_euler_steps_through_unipcs_sigmas(folders):
    policy = load(folders("wan"))
    unipc = UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    unipc.set_timesteps(6)
    assert torch.equal(policy.sigmas(6, ()), unipc.sigmas)
    # UniPC of first order without a corrector is Euler, with timesteps that are cut to integers
    velocity = policy.velocity
    policy.velocity = lambda latents, sigma, conditioning: velocity(
        latents, (sigma * 1000).trunc() / 1000, conditioning
    )
    noise = noise_of(policy, "wan", 1, seed=3)
    pipe = WanPipeline.from_pretrained(folders("wan"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, solver_order=1, disable_corrector=list(range(6))
    )
    settings = {"num_inference_steps": 6, "max_sequence_length": 12, "output_type": "latent", **VIDEO}
    expected = pipe(TEXTS[:1], guidance_scale=1, latents=noise, **settings).frames
    latents = sample_ode(policy, policy.encode(TEXTS[:1]), 6, noise)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_flux_is_told_the_distilled_guidance(folders, name):
    low, high = (load(folders(name), distilled_guidance=guidance) for guidance in (3.5, 7.0))
    latents, sigma, conditioning = inputs(low, name)
    with torch.no_grad():
        assert not torch.equal(low.velocity(latents, sigma, conditioning), high.velocity(latents, sigma, conditioning))


def test_padding_of_qwens_prompts_has_no_effect(folders):
    short, long = load(folders("qwen")), load(folders("qwen"), max_sequence_length=40)
    latents, sigma, conditioning = inputs(short, "qwen")
    assert conditioning["encoder_hidden_states_mask"].sum(1).unique().numel() > 1  # prompts of different lengths
    assert conditioning["encoder_hidden_states"].shape[1] == 12
    padded = long.encode(TEXTS)
    alone = {name: tensor[:1] for name, tensor in short.encode(TEXTS).items()}
    with torch.no_grad():
        velocity = short.velocity(latents, sigma, conditioning)
        whole = padded["encoder_hidden_states_mask"].sum(1) <= 12
        assert whole.any()
        other = long.velocity(latents, sigma, padded)
        torch.testing.assert_close(other[whole], velocity[whole], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(short.velocity(latents[:1], sigma[:1], alone), velocity[:1], rtol=1e-4, atol=1e-5)


def test_z_image_takes_prompts_of_any_length_together(folders):
    policy = load(folders("zimage"), max_sequence_length=80)
    prompts = ["snow", "two dogs on a hill and a cat in a tree by the sea"]  # of one and of two times 32 tokens
    latents, sigma, conditioning = noise_of(policy, "zimage", 2), torch.full((2,), 0.7), policy.encode(prompts)
    assert (conditioning["lengths"] <= 32).tolist() == [True, False]
    with torch.no_grad():
        together = policy.velocity(latents, sigma, conditioning)
        for i in range(2):
            one = {name: tensor[i : i + 1] for name, tensor in conditioning.items()}
            alone = policy.velocity(latents[i : i + 1], sigma[i : i + 1], one)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
            captions = policy.pipeline.encode_prompt(prompts[i : i + 1], max_sequence_length=80)[0]
            timestep = 1 - sigma[i : i + 1]
            plain = policy.module([latents[i].unsqueeze(1)], timestep, captions, return_dict=False)[0][0]
            torch.testing.assert_close(alone[0], -plain.squeeze(1), rtol=1e-4, atol=1e-5)


def test_warnings(folders, tmp_path):
    for name, unguided in (("sd35", False), ("flux2", True), ("klein", False)):
        policy = load(folders(name))
        assert policy.warnings(guided=False) == [] and len(policy.warnings(guided=True)) == unguided
    pipe = tiny_flux2_klein_pipeline(is_distilled=True)
    pipe.save_pretrained(tmp_path / "klein")
    distilled, guided = load(tmp_path / "klein").warnings(guided=True)
    assert "klein was distilled to few steps" in distilled
    assert "does not apply classifier-free guidance" in guided and "set rollout.guidance_scale and" in guided
    pipe = tiny_flux_pipeline()
    pipe.transformer.register_to_config(guidance_embeds=False)
    assert "was distilled" in FluxPolicy(pipe, PolicyConfig()).warnings(guided=True)[0]
    for name in ("3.5-large-turbo", "3.5-large"):
        (tmp_path / name).symlink_to(folders("sd35_large"))
    (warning,) = load(tmp_path / "3.5-large-turbo").warnings(guided=True)
    assert "3.5-large-turbo was distilled to few steps" in warning and "train the model that it was" in warning
    assert load(tmp_path / "3.5-large").warnings(guided=True) == []


def test_a_run_prints_the_warnings(folders, tmp_path, capsys):
    Trainer(config_of(folders("flux2"), tmp_path, "flux2", guidance=2.0)).accelerator.end_training()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: the pipeline of")]
    assert line.endswith("set rollout.guidance_scale and evaluation.guidance_scale to 1")


def test_sizes(folders):
    assert load(folders("zimage")).latent_shape(16, None) == (4, 8, 512)
    klein = load(folders("klein"))
    assert (klein.latent_shape(16, 24), klein.latent_shape(None, 16)) == ((16, 4, 6), (16, 64, 4))
    with pytest.raises(UserError, match=r"rollout\.height 18 is not a positive multiple of 4"):
        klein.latent_shape(18, 16)
    assert load(folders("wan22")).latent_shape(16, 32, 5) == (4, 3, 4, 8)
    assert load(folders("flux")).latent_shape(16, 24) == (4, 8, 12)
    assert load(folders("qwen")).latent_shape(None, None) == (4, 128, 128)
    policy = load(folders("wan"))
    assert policy.latent_shape(16, 32, 5) == (4, 3, 8, 16)
    assert policy.latent_shape(16, 32, 1) == (4, 1, 8, 16)
    assert policy.latent_shape(None, None) == (4, 41, 240, 416)
    with pytest.raises(UserError, match=r"rollout\.num_frames 6 is not 1 more than a multiple of 2"):
        policy.latent_shape(16, 32, 6)
    with pytest.raises(UserError, match=r"rollout\.height 18 is not a positive multiple of 4"):
        policy.latent_shape(18, 32, 5)
    for name in ("sd35", "flux", "qwen", "zimage", "klein"):
        with pytest.raises(UserError, match=r"rollout\.num_frames 5: this model makes images"):
            load(folders(name)).latent_shape(16, 16, 5)


def test_other_wan_models_are_refused(folders, tmp_path):
    pipe = tiny_wan_pipeline()
    pipe.register_to_config(boundary_ratio=0.8)
    pipe.save_pretrained(tmp_path / "one")
    with pytest.raises(UserError, match=r"needs a transformer, or a transformer, a transformer_2 and a boundary_ratio"):
        load(tmp_path / "one")
    pipe = tiny_wan_pipeline()
    pipe.scheduler = UniPCMultistepScheduler()
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="UniPCMultistepScheduler, does not use flow-matching sigmas"):
        load(tmp_path / "other")


# what is trained


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("name", "rank"), each([(0,), (4,)], [(4,)]))
def test_the_trained_weights_change_the_output_and_the_reference_stays(folders, name, rank):
    policy = load(folders(name), lora_rank=rank, dtype="bfloat16")
    trained = policy.trainable_parameters()
    assert trained
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    latents, sigma, conditioning = inputs(policy, name)
    with torch.no_grad():
        before = policy.velocity(latents, sigma, conditioning)
        perturb(trained)
        after = policy.velocity(latents, sigma, conditioning)
        assert (after - before).abs().max() > 0.01
        with policy.reference():
            torch.testing.assert_close(policy.velocity(latents, sigma, conditioning), before, rtol=0, atol=0.02)
    assert after.dtype == torch.bfloat16


def config_of(folder, output, name, *, window=(2, (0, 3)), guidance=1.0, **policy):
    family, (size, start) = GENERATING[name], window
    return Config(
        model=str(folder),
        output_dir=str(output / "run"),
        trackers=[],
        reward_frames=2,
        policy=PolicyConfig(**{"lora_rank": 4, "lora_alpha": 8, "max_sequence_length": family.length, **policy}),
        prompts=PromptsConfig(train=str(family.prompts(folder)), per_epoch=2),
        rollout=RolloutConfig(
            guidance_scale=guidance,
            group_size=3,
            num_steps=5,
            window_size=size,
            window_start=start,
            batch_size=6,
            **family.size,
        ),
        update=UpdateConfig(batch_size=6, per_epoch=1, ema_decay=0.0),
        rewards={"jpeg_compressibility": 1},
        evaluation=EvaluationConfig(num_steps=3, images_per_prompt=2),
    )


def ratios(config):
    """Ratios of an epoch's pairs before the first update, with an adapter that does something."""
    trainer = Trainer(config)
    perturb(trainer.learner.parameters)
    batch, _ = trainer.collect(0)
    pairs = trainer.objective.micro_batches(batch, 0, len(batch.advantages))
    return torch.cat([trainer.objective.loss(batch, rows, slots)[1]["ratio"] for rows, slots in pairs])


WINDOW, ALL_STEPS = ((2, (0, 3)), 1.0), ((None, (0, 3)), 4.5)


@pytest.mark.parametrize(
    ("name", "dtype", "window", "guidance"),
    each(
        [("float32", *WINDOW), ("bfloat16", *WINDOW), ("bfloat16", *ALL_STEPS), ("float16", *ALL_STEPS)],
        [("bfloat16", *ALL_STEPS)],
        GENERATING,
    ),
)
def test_the_ratio_is_exactly_one_before_the_first_update(folders, tmp_path, name, dtype, window, guidance):
    config = config_of(folders(name), tmp_path, name, dtype=dtype, window=window, guidance=guidance)
    found = ratios(config)
    assert len(found) >= 6
    assert (found == 1).all()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of float32 norms: slower
@pytest.mark.parametrize("name", TESTED)
def test_the_ratio_is_exactly_one_in_full_fine_tuning_with_checkpointing(folders, tmp_path, name):
    config = config_of(
        folders(name), tmp_path, name, dtype="bfloat16", lora_rank=0, gradient_checkpointing=True, guidance=4.5
    )
    assert (ratios(config) == 1).all()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(
    ("name", "rank", "algorithm"), each([(4, "nft"), (0, "awm"), (4, "dgpo")], [(4, "nft"), (4, "dgpo")])
)
def test_forward_process_methods_train_every_family(folders, tmp_path, name, rank, algorithm):
    config = config_of(folders(name), tmp_path, name, dtype="bfloat16", lora_rank=rank, guidance=1.0)
    size = GENERATING[name].size
    config.rollout = RolloutConfig(dynamics="ode", solver="dpm_solver", group_size=3, num_steps=3, batch_size=6, **size)
    config.update = UpdateConfig(algorithm=algorithm, batch_size=6, noise_draws=2, kl_weight=0.01, old_decay_slope=0.1)
    trainer = Trainer(config)
    for epoch in range(2):
        metrics = trainer.learner.update(trainer.collect(epoch)[0])
        assert metrics["trained_pairs"] > 0 and math.isfinite(metrics["policy_loss"]) and metrics["grad_norm"] > 0
    assert metrics["kl"] > 0 and metrics["old_distance"] > 0


@pytest.mark.parametrize(("name", "rank"), each([(0,), (4,)], [(4,)], GENERATING))
def test_the_command_trains_and_its_weights_give_its_own_images_in_a_fresh_pipeline(
    folders, tmp_path, name, rank, monkeypatch
):
    shown = []
    monkeypatch.setattr(Report, "evaluated", lambda self, evaluation, step: shown.append(evaluation))
    monkeypatch.setattr(Report, "finish", lambda self, prompts: None)
    folder, run, family = folders(name), tmp_path / "run", GENERATING[name]
    own = [f"--rollout.{key}={value}" for key, value in family.size.items()]
    own += [f"--policy.max_sequence_length={family.length}"] if family.length else []
    command = (
        f"--model {folder} --prompts.train {family.prompts(folder)} --output_dir {run} --epochs 2 --trackers [] "
        f"--policy.lora_rank {rank} --policy.lora_alpha 8 --reward_frames 1 "
        "--prompts.per_epoch 2 --rollout.group_size 3 --rollout.batch_size 6 --rollout.num_steps 4 "
        "--rollout.guidance_scale 2 --rollout.window_size 2 --rollout.window_start [0,2] --update.batch_size 6 "
        "--update.kl_weight 0.01 --update.learning_rate 0.01 --update.ema_every 1 "
        "--evaluation.num_steps 3 --evaluation.images_per_prompt 2 --evaluation.guidance_scale 1"
    ).split()
    assert main([*command, *own, "--rewards", '{"jpeg_compressibility": 1}']) == 0

    saved = run / "checkpoints/checkpoint-4"
    pipe = DiffusionPipeline.from_pretrained(folder)
    base = {key: tensor.clone() for key, tensor in pipe.transformer.state_dict().items()}
    if rank:
        averaged, raw = load_file(saved / LORA), load_file(saved / "raw" / LORA)
        # all but those of the text stream in the last block, which nothing depends on
        moved = [bool(tensor.any()) for key, tensor in raw.items() if "lora_B" in key]
        assert sum(moved) >= 0.7 * len(moved)
        load_loras(pipe, saved)
        if "experts" in name:
            assert any(tensor.any() for key, tensor in load_file(saved / LORA_2).items() if "lora_B" in key)
    else:
        pipe.transformer = type(pipe.transformer).from_pretrained(saved / "transformer")
        averaged = pipe.transformer.state_dict()
        raw = type(pipe.transformer).from_pretrained(saved / "raw/transformer").state_dict()
        assert sum(not torch.equal(base[key], raw[key]) for key in base) > len(base) / 2
    assert any(not torch.equal(averaged[key], raw[key]) for key in raw)

    policy = load(folder)
    shape, prompts = policy.latent_shape(**family.size), prompts_of(policy, name)
    noise = philox_normal(sample_seeds(range(len(prompts)), 2), 0, (2 * len(prompts), *shape))
    expected = pipeline_images(pipe, family, noise, [prompt for prompt in prompts for _ in range(2)], 3, 1.0)
    if policy.makes_videos:
        expected = expected[:, 2]  # the middle one of 5 frames
    assert_same_images(shown[-1].shown.images.flatten(0, 1), expected)
    assert (shown[-1].shown.images != shown[0].shown.images).any()


# a LoRA to continue from


@pytest.mark.parametrize("name", TESTED)
def test_training_continues_from_a_saved_lora(folders, tmp_path, name):
    first = load(folders(name), lora_rank=3, lora_alpha=5)
    perturb(first.trainable_parameters())
    first.save(tmp_path)
    for dtype in ("float32", "bfloat16"):
        second = load(folders(name), lora=str(tmp_path), lora_rank=None, lora_alpha=99, dtype=dtype)
        assert len(second.trainable_parameters()) == len(first.trainable_parameters())
        for own, other in zip(second.trainable_parameters(), first.trainable_parameters(), strict=True):
            assert torch.equal(own, other)  # float32 values, whatever the model's dtype
    latents, sigma, conditioning = inputs(first, name)
    second = load(folders(name), lora=str(tmp_path if "experts" in name else tmp_path / LORA), lora_rank=3)
    with torch.no_grad():
        velocity = first.velocity(latents, sigma, conditioning)
        assert torch.equal(second.velocity(latents, sigma, conditioning), velocity)
        with second.reference():
            assert not torch.equal(second.velocity(latents, sigma, conditioning), velocity)
    second.velocity(latents, sigma, conditioning).sum().backward()
    assert sum(parameter.grad is not None for parameter in second.trainable_parameters()) > 10


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("name", "dtype"), [*each([("bfloat16",)], [("bfloat16",)]), ("sd35", "float16")])
def test_a_float32_adapter_computes_what_the_saved_one_does_in_the_models_dtype(folders, tmp_path, name, dtype):
    policy = load(folders(name), dtype=dtype)
    perturb(policy.trainable_parameters())
    policy.save(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(folders(name), dtype=policy.dtype)
    load_loras(pipeline, tmp_path)
    latents, sigma, conditioning = inputs(policy, name)
    velocity = policy.velocity(latents, sigma, conditioning)
    velocity.float().square().mean().backward()
    gradients = [parameter.grad for parameter in policy.trainable_parameters() if parameter.grad is not None]
    assert len(gradients) > 10 and all(gradient.dtype == torch.float32 for gradient in gradients)
    two = (pipeline.transformer, pipeline.transformer_2, policy.module.boundary) if "experts" in name else None
    policy.transformer = Experts(*two) if two else pipeline.transformer
    with torch.no_grad():
        assert torch.equal(policy.velocity(latents, sigma, conditioning), velocity)


def test_a_lora_that_does_not_fit_is_refused(folders, tmp_path):
    load(folders("wan")).save(tmp_path / "wan")
    load(folders("sd35"), lora_rank=3).save(tmp_path / "sd35")
    with pytest.raises(UserError, match=r"policy\.lora: .*sd35 has rank 3, not policy\.lora_rank 4"):
        load(folders("sd35"), lora=str(tmp_path / "sd35"))
    with pytest.raises(UserError, match=r"policy\.lora: .*wan (cannot be loaded into|fits another model)"):
        load(folders("sd35"), lora=str(tmp_path / "wan"), lora_rank=None)
    with pytest.raises(UserError, match=r"policy\.lora: .*nowhere cannot be loaded"):
        load(folders("sd35"), lora=str(tmp_path / "nowhere"), lora_rank=None)
    file = tmp_path / "sd35/pytorch_lora_weights.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    for change, message in (
        ({name.replace("transformer.", "text_encoder."): weights[name]}, "has weights for text_encoder"),
        ({name.replace("blocks.0", "blocks.7"): weights[name]}, r"blocks\.7"),
        ({name: torch.zeros(3, 5)}, "cannot be loaded into"),
    ):
        save_file({key: tensor.clone() for key, tensor in (weights | change).items()}, file)
        with pytest.raises(UserError, match=message):
            load(folders("sd35"), lora=str(tmp_path / "sd35"), lora_rank=None)


# memory and speed


@pytest.mark.parametrize("name", TESTED)
def test_checkpointing_computes_the_same_gradients_again(folders, name):
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # of the adapter
        policy = load(folders(name), gradient_checkpointing=checkpointing)
        perturb(policy.trainable_parameters())
        transformer, names = policy.pipeline.transformer, ("transformer_blocks", "blocks", "layers")
        blocks = next(getattr(transformer, name) for name in names if hasattr(transformer, name))
        count = []
        blocks[0].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        policy.velocity(*inputs(policy, name)).square().sum().backward()
        calls.append(len(count))
        gradients.append([p.grad for p in policy.trainable_parameters() if p.grad is not None])
    assert calls == [1, 2]
    assert gradients[0]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.fixture
def own_backend():
    """diffusers keeps the chosen attention backend for the whole process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def test_cudnn_attention_is_off_unless_a_backend_is_asked_for(folders, own_backend, monkeypatch):
    switched = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    load(folders("flux"))
    assert switched == [False]
    load(folders("flux"), attention="_native_math")
    assert switched == [False]


@pytest.mark.parametrize("name", WITH_DISPATCHER)
def test_attention_backends(folders, name, own_backend):
    plain = load(folders(name))
    chosen = load(folders(name), attention="_native_math")
    processors = [module.processor for module in chosen.module.modules() if hasattr(module, "processor")]
    assert {processor._attention_backend.value for processor in processors} == {"_native_math"}
    latents, sigma, conditioning = inputs(plain, name)
    with torch.no_grad():
        torch.testing.assert_close(
            chosen.velocity(latents, sigma, conditioning), plain.velocity(latents, sigma, conditioning)
        )


@pytest.mark.parametrize("name", ["flux", "qwen"])  # without and with a mask
def test_attention_backends_that_do_not_work_are_refused(folders, name, own_backend, monkeypatch):
    from diffusers.models import attention_dispatch

    with pytest.raises(UserError, match=r"policy\.attention: flash does not work here: .*flash-attn"):
        load(folders(name), attention="flash")
    with pytest.raises(UserError, match=r"policy\.attention: flsh does not work here: .*must be one of"):
        load(folders(name), attention="flsh")
    # installed, but without a backward pass, and of no use on this device
    with monkeypatch.context() as patch:
        patch.setattr(base, "dispatch_attention_fn", lambda query, *_, **__: query.detach())
        with pytest.raises(UserError, match=r"policy\.attention: native does not work here: .*grad"):
            load(folders(name), attention="native")
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
    with pytest.raises(UserError, match=r"policy\.attention: flash does not work here"):
        load(folders(name), attention="flash")


def test_sd3_takes_xformers(folders, monkeypatch):
    calls = []

    def attend(query, key, value, attn_bias, op, scale):
        """What xformers.ops.memory_efficient_attention computes for (B, tokens, width)."""
        assert attn_bias is None
        calls.append(len(query))
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    def installed(function):
        monkeypatch.setattr(sd3, "is_xformers_available", lambda: True)
        ops = SimpleNamespace(memory_efficient_attention=function)
        monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))

    def velocity_and_gradients(policy):
        perturb(policy.trainable_parameters())
        velocity = policy.velocity(*inputs(policy, "sd35"))
        velocity.square().sum().backward()
        return velocity, [parameter.grad for parameter in policy.trainable_parameters()]

    installed(attend)
    torch.manual_seed(0)  # of the adapter
    chosen = load(folders("sd35"), attention="xformers", gradient_checkpointing=True)
    tried = len(calls)
    torch.manual_seed(0)
    plain = load(folders("sd35"), gradient_checkpointing=True)
    (velocity, gradients), (expected, expected_gradients) = map(velocity_and_gradients, (chosen, plain))
    assert tried == 1 and len(calls) == tried + 2 * 3  # of two blocks, each computed again in the backward pass
    torch.testing.assert_close(velocity, expected)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other)
    installed(lambda query, key, value, **_: query.detach())
    with pytest.raises(UserError, match=r"policy\.attention: xformers does not work here: .*grad"):
        load(folders("sd35"), attention="xformers")


def test_sd3_without_xformers(folders, monkeypatch):
    monkeypatch.setattr(sd3, "is_xformers_available", lambda: False)
    with pytest.raises(UserError, match=r"policy\.attention: xformers does not work here: it is not installed"):
        load(folders("sd35"), attention="xformers")
    with pytest.raises(UserError, match=r"policy\.attention: flash does not work here: .* has only xformers"):
        load(folders("sd35"), attention="flash")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in tracing
@pytest.mark.parametrize(
    "name", [name for name in TESTED if name not in ("wan22", "flux2")]
)  # wan's and klein's blocks
def test_compiled_blocks_are_the_same_in_rollout_and_update(folders, tmp_path, name, monkeypatch):
    with_graph = []
    compile_blocks = ModelMixin.compile_repeated_blocks

    def backend(graph, inputs):
        with_graph.append(torch.is_grad_enabled())
        return graph  # as it is; the test with Inductor has the passes that follow

    def quickly(self, **settings):
        assert settings == {"fullgraph": True, "dynamic": False}
        compile_blocks(self, backend=backend, **settings)

    monkeypatch.setattr(ModelMixin, "compile_repeated_blocks", quickly)
    torch._dynamo.reset()
    found = ratios(config_of(folders(name), tmp_path, name, compile=True, dtype="bfloat16", lora_targets=["to_q"]))
    assert with_graph
    assert all(with_graph)
    assert (found == 1).all()


def peak_bytes(work):
    """The most bytes that were allocated at once beyond those at the start."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_the_rollout_saves_nothing_and_all_is_compiled_before_the_first_epoch(folders, tmp_path, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(inputs)
        return aot_eager(graph, inputs)

    compile_blocks = ModelMixin.compile_repeated_blocks
    monkeypatch.setattr(ModelMixin, "compile_repeated_blocks", partialmethod(compile_blocks, backend=backend))
    torch._dynamo.reset()
    trainer = Trainer(config_of(folders("sd35"), tmp_path, "sd35", compile=True))
    perturb(trainer.learner.parameters)
    trainer._warm_up()
    graphs = len(compiled)
    batch, _ = trainer.collect(0)
    batch.advantages = torch.arange(1.0, 7.0)  # all pairs are trained on
    trainer.learner.update(batch)
    # a smaller last micro-batch
    trainer.learner.update(replace(batch, advantages=torch.tensor([1.0, -1.0, 0.0, 2.0, -2.0, 1.0])))
    assert len(compiled) == graphs > 0

    inputs = batch.trajectory.final, torch.full((6,), 0.5), repeat_rows(batch.conditioning, torch.arange(6) // 3)

    @torch.no_grad()
    def velocity():
        trainer.policy.velocity(*inputs)

    saving_nothing = peak_bytes(velocity)
    monkeypatch.setattr(base, "saved_tensors_hooks", lambda *_: nullcontext())
    saving = peak_bytes(velocity)
    assert saving_nothing < 0.8 * saving  # of the two blocks, one is held at a time


def test_repeats_in_a_smaller_micro_batch_change_nothing(folders, tmp_path):
    trainer = Trainer(config_of(folders("sd35"), tmp_path, "sd35"))
    perturb(trainer.learner.parameters)
    batch, _ = trainer.collect(0)
    batch.advantages = torch.tensor([1.0, -1.0, 0.5, 2.0, -2.0, 0.0])
    found = {}
    for compiled in (False, True):  # only as the learner sees it
        trainer.learner.config.policy.compile = compiled
        micro_batches = trainer.objective.micro_batches(batch, 0, 6)
        statistics = trainer.learner.accumulate(batch, micro_batches)
        gradients = [parameter.grad.clone() for parameter in trainer.learner.parameters]
        found[compiled] = gradients, concatenate(statistics)
        trainer.learner.optimizer.zero_grad()
    assert len(micro_batches[-1][0]) < 6
    for gradient, padded in zip(found[False][0], found[True][0], strict=True):
        torch.testing.assert_close(padded, gradient, rtol=1e-4, atol=1e-6)
    assert found[True][1].keys() == found[False][1].keys()
    for name, value in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.slow
def test_an_inductor_run_has_ratio_one(folders, tmp_path):
    torch._dynamo.reset()
    config = config_of(folders("sd35"), tmp_path, "sd35", compile=True, dtype="bfloat16")
    assert (ratios(config) == 1).all()


# embeddings on disk


def test_a_run_with_embeddings_on_disk_frees_the_encoders_and_samples_the_same(folders, tmp_path):
    folder = tmp_path / "embeddings"
    batches, written = [], []
    for number in range(3):
        config = config_of(folders("flux"), tmp_path / str(number), "flux", guidance=2.0)
        config.policy.embeddings_dir = str(folder) if number else None
        trainer = Trainer(config)
        if number:
            assert trainer.policy.pipeline.text_encoder is None
            assert trainer.policy.pipeline.text_encoder_2 is None
            written.append({path.name: path.stat().st_mtime_ns for path in folder.iterdir()})
        batches.append(trainer.collect(0)[0])
    assert len(written[0]) == len(TEXTS) + 1
    assert written[1] == written[0]  # the second run found them
    torch.testing.assert_close(batches[1].trajectory.final, batches[0].trajectory.final, rtol=1e-3, atol=1e-4)
    assert torch.equal(batches[2].trajectory.final, batches[1].trajectory.final)


def test_embeddings_on_disk_are_told_apart_and_checked(folders, tmp_path):
    def key(**settings):
        return load(folders("flux"), **settings).encoder_key()

    assert key() == key(lora_rank=0)
    others = ({"max_sequence_length": 8}, {"dtype": "bfloat16"}, {"text_encoder_dtype": "bfloat16"})
    assert len({key(), *(key(**other) for other in others)}) == 4
    policy = load(folders("flux"))
    expected = policy.encode(TEXTS[:1])
    cache = EmbeddingCache(policy, tmp_path / "cache")
    cache.prepare(TEXTS[:1])
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"policy\.embeddings_dir: an embedding is missing or damaged, start the run"):
        cache(TEXTS[:1])
    abandoned, begun = (file.with_suffix(f".{digit * 32}") for digit in "ab")  # by a killed process, and by another run
    for unfinished in (abandoned, begun):
        unfinished.touch()
    os.utime(abandoned, (0, 0))
    cache = EmbeddingCache(load(folders("flux")), tmp_path / "cache")
    cache.prepare(TEXTS[:1])  # makes the torn one again
    assert not abandoned.exists() and begun.exists()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in cache(TEXTS[:1]).items())

    policy = load(folders("flux"))
    with torch.no_grad():
        policy.pipeline.text_encoder_2.shared.weight[3, 5] += 0.1
    assert policy.encoder_key() != key()
    with pytest.raises(UserError, match=r"policy\.embeddings_dir .* cannot be written"):
        EmbeddingCache(policy, file).prepare(TEXTS)
