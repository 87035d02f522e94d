"""Wan image to video, besides the tests of all families: the source in the result, and where encoders wait."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from support.families import GENERATING, VIDEO, assert_same_images, pipeline_images
from support.pipelines import perturb

from fastflowgrpo import Config, Trainer, load_policy
from fastflowgrpo.config import PolicyConfig, PromptsConfig, RolloutConfig, UpdateConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.planning.meta_pipeline import meta_pipeline
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.source_images import check_source_images
from fastflowgrpo.prompts import load_prompts
from fastflowgrpo.runs.report import Report
from fastflowgrpo.sampling.rollout import sample_seeds
from fastflowgrpo.train import main

KINDS = ("i2v", "i2v_experts", "i2v_wan22")
TEXTS = ["it flies away", "snow falls"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("families") / kind
            replace(GENERATING[kind], sources=1).save(made[kind], TEXTS)
        return made[kind]

    return folder


def load(folder, **settings):
    return load_policy(str(folder), PolicyConfig(lora_rank=4, lora_alpha=8, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_each_frame_depends_on_the_source(folders, kind):
    policy = load(folders(kind))
    noise = torch.randn(2, *policy.latent_shape(**VIDEO), generator=torch.Generator().manual_seed(3))
    conditioning = EmbeddingCache(policy, shape=tuple(noise.shape[1:]))(load_prompts(f"{folders(kind)}/prompts.jsonl"))
    others = {name: tensor.flip(0) for name, tensor in conditioning.items() if name not in policy.encode(["a"])}
    with torch.no_grad():
        velocities = [
            policy.velocity(noise, torch.ones(2), given) for given in (conditioning, {**conditioning, **others})
        ]
    assert (velocities[0] - velocities[1]).abs().amax((1, 3, 4)).min() > 1e-4


def test_wan22_5b_is_loaded_as_image_to_video(folders):
    text, image = load(folders("wan22")), load(folders("i2v_wan22"))
    policy = load(folders("wan22"), image_to_video=True)
    noise = torch.randn(2, *policy.latent_shape(**VIDEO), generator=torch.Generator().manual_seed(3))
    prompts = load_prompts(f"{folders('wan22')}/prompts.jsonl")
    conditioning = EmbeddingCache(policy, shape=tuple(noise.shape[1:]))(prompts)
    with torch.no_grad():
        velocities = [one.velocity(noise, torch.full((2,), 0.7), conditioning) for one in (policy, image)]
    assert torch.equal(*velocities) and policy.edits_images
    with pytest.raises(UserError, match=r"has a source image, but .* for Wan 2\.2 TI2V-5B set policy\.image_to_video"):
        check_source_images(text, prompts)
    pipe = meta_pipeline(str(folders("wan22")), PolicyConfig(image_to_video=True))
    assert type(pipe) is WanImageToVideoPipeline
    with pytest.raises(
        UserError, match=r'^policy\.image_to_video: .*TI2V-5B, and ".*wan" is another WanPipeline: leave'
    ):
        load(folders("wan"), image_to_video=True)


def test_wan21_needs_its_number_of_text_tokens(folders):
    with pytest.raises(UserError, match=r"policy\.max_sequence_length 12: Wan 2\.1 image to video takes 512"):
        load(folders("i2v"), max_sequence_length=12)
    assert load(folders("i2v_experts"), max_sequence_length=12).sequence_length == 12


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_first_frame_of_wan22_5b_is_the_source_and_the_ratio_is_one(folders, tmp_path):
    folder = folders("i2v_wan22")
    config = Config(
        model=str(folder),
        output_dir=str(tmp_path / "run"),
        trackers=[],
        policy=PolicyConfig(lora_rank=4, dtype="bfloat16", max_sequence_length=12),
        prompts=PromptsConfig(train=str(folder / "prompts.jsonl"), per_epoch=2),
        rollout=RolloutConfig(
            group_size=2, num_steps=4, batch_size=4, guidance_scale=3.0, window_size=2, window_start=(0, 2), **VIDEO
        ),
        update=UpdateConfig(batch_size=4, per_epoch=1),
        rewards={"support.worker_rewards:unlike_source": 1},
    )
    trainer = Trainer(config)
    perturb(trainer.learner.parameters)
    batch, _ = trainer.collect(0)
    source = batch.conditioning["source"][:, 0].repeat_interleave(2, 0)
    torch.testing.assert_close(batch.trajectory.final[:, :, :1], source, rtol=0.02, atol=0.02)
    assert (batch.trajectory.latents[:, 0, :, 0] - source[:, :, 0]).abs().max() > 0.5  # noisy before
    batch.advantages = torch.ones(4)
    pairs = trainer.objective.micro_batches(batch, 0, 4)
    found = torch.cat([trainer.objective.loss(batch, rows, slots)[1]["ratio"] for rows, slots in pairs])
    assert len(found) == 8 and (found == 1).all()
    trainer.accelerator.end_training()


@pytest.mark.parametrize(("kind", "flags"), [("i2v", []), ("wan22", ["--policy.image_to_video"])])
def test_the_command_trains_with_offloaded_encoders_and_embeddings_on_disk(folders, tmp_path, kind, flags, monkeypatch):
    shown = []
    monkeypatch.setattr(Report, "evaluated", lambda self, evaluation, step: shown.append(evaluation))
    monkeypatch.setattr(Report, "finish", lambda self, prompts: None)
    folder, run = folders(kind), tmp_path / "run"
    family = replace(GENERATING[kind], sources=1, length=None)
    size = [f"--rollout.{key}={value}" for key, value in VIDEO.items()]
    command = (
        f"--model {folder} --prompts.train {folder / 'prompts.jsonl'} --output_dir {run} --epochs 2 --trackers [] "
        "--policy.lora_rank 4 --policy.lora_alpha 8 --policy.offload --policy.decode_batch_size 2 --reward_frames 1 "
        f"--policy.embeddings_dir {tmp_path / 'embeddings'} --prompts.per_epoch 2 --rollout.group_size 2 "
        "--rollout.batch_size 4 --rollout.num_steps 4 --rollout.guidance_scale 2 --rollout.window_size 2 "
        "--rollout.window_start [1,2] --update.batch_size 4 --update.learning_rate 0.01 --update.kl_weight 0.01 "
        "--evaluation.num_steps 2 --evaluation.images_per_prompt 2 --evaluation.guidance_scale 1"
    ).split()
    assert main([*command, *size, *flags, "--rewards", json.dumps({"support.worker_rewards:unlike_source": 1})]) == 0
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    saved = run / "checkpoints/checkpoint-4"
    pipe.load_lora_weights(saved)
    assert f"pipe = {'Wan' if flags else 'Diffusion'}" in (saved / "README.md").read_text()
    noise = philox_normal(sample_seeds(range(2), 2), 0, (4, *load(folder).latent_shape(**VIDEO)))
    prompts = [prompt for prompt in load_prompts(f"{folder}/prompts.jsonl") for _ in range(2)]
    images = shown[-1].shown.images.flatten(0, 1)
    assert_same_images(images, pipeline_images(pipe, family, noise, prompts, 2, 1.0)[:, 2])
    assert (images != shown[0].shown.images.flatten(0, 1)).any()
