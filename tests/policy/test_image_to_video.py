"""Wan image to video: the pipeline's own latents, the source in the result, and training through the command."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image
from support.pipelines import EulerOnUniPCsSigmas, perturb, tiny_wan_image_to_video_pipeline

from fastflowgrpo import Config, Trainer, load_policy
from fastflowgrpo.config import PolicyConfig, PromptsConfig, RolloutConfig, UpdateConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.weights import LORA_2
from fastflowgrpo.prompts import load_prompts
from fastflowgrpo.runs.report import Report
from fastflowgrpo.sampling.ode import sample_ode
from fastflowgrpo.sampling.rollout import sample_seeds
from fastflowgrpo.train import main

KINDS = ("wan21", "experts", "wan22_5b")
SIZE = {"height": 16, "width": 32, "num_frames": 5}
TEXTS = ["it flies away", "snow falls"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines, with prompts.jsonl and source images of the size of the videos."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = path = tmp_path_factory.mktemp(kind)
            tiny_wan_image_to_video_pipeline(kind).save_pretrained(path)
            for i in range(2):
                pixels = torch.randint(0, 256, (16, 32, 3), generator=torch.Generator().manual_seed(i))
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(path / f"{i}.png")
            lines = [json.dumps({"prompt": text, "image": f"{i}.png"}) for i, text in enumerate(TEXTS)]
            (path / "prompts.jsonl").write_text("\n".join(lines))
        return made[kind]

    return folder


def load(folder, **settings):
    return load_policy(str(folder), PolicyConfig(lora_rank=4, lora_alpha=8, **settings))


@pytest.fixture(autouse=True)
def ftfy(monkeypatch):
    """The pipeline's call needs ftfy, which corrects texts. These are correct."""
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=lambda text: text), raising=False)


def pipeline_latents(pipe, folder, noise, num_steps, guidance, rows):
    """Latents of the unmodified pipeline's call, which takes one image at a time."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerOnUniPCsSigmas(shift=3.0)
    settings = {"num_inference_steps": num_steps, "guidance_scale": guidance, "output_type": "latent", **SIZE}
    return torch.cat(
        [
            pipe(Image.open(folder / f"{row}.png"), TEXTS[row], latents=noise[i : i + 1], **settings).frames
            for i, row in enumerate(rows)
        ]
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_ode_samples_are_the_pipelines_own(folders, kind, guidance):
    folder = folders(kind)
    policy = load(folder)
    noise = torch.randn(2, *policy.latent_shape(**SIZE), generator=torch.Generator().manual_seed(3))
    embed = EmbeddingCache(policy, shape=tuple(noise.shape[1:]))
    conditioning = embed(load_prompts(str(folder / "prompts.jsonl")))
    unconditional = embed([""]) if guidance != 1 else None
    latents = sample_ode(policy, conditioning, 3, noise, unconditional=unconditional, guidance_scale=guidance)
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    expected = pipeline_latents(pipe, folder, noise, 3, guidance, range(2))
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4)
    others = {name: tensor.flip(0) for name, tensor in conditioning.items() if name not in policy.encode(["a"])}
    with torch.no_grad():
        velocities = [
            policy.velocity(noise, torch.ones(2), given) for given in (conditioning, {**conditioning, **others})
        ]
    assert (velocities[0] - velocities[1]).abs().amax((1, 3, 4)).min() > 1e-4  # in each frame


def test_wan21_needs_its_number_of_text_tokens(folders):
    with pytest.raises(UserError, match=r"policy\.max_sequence_length 12: Wan 2\.1 image to video takes 512"):
        load(folders("wan21"), max_sequence_length=12)
    assert load(folders("experts"), max_sequence_length=12).sequence_length == 12


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_first_frame_of_wan22_5b_is_the_source_and_the_ratio_is_one(folders, tmp_path):
    folder = folders("wan22_5b")
    config = Config(
        model=str(folder),
        output_dir=str(tmp_path / "run"),
        trackers=[],
        policy=PolicyConfig(lora_rank=4, dtype="bfloat16", max_sequence_length=12),
        prompts=PromptsConfig(train=str(folder / "prompts.jsonl"), per_epoch=2),
        rollout=RolloutConfig(
            group_size=2, num_steps=4, batch_size=4, guidance_scale=3.0, window_size=2, window_start=(0, 2), **SIZE
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_trains_a_lora_that_gives_its_videos_in_a_fresh_pipeline(folders, tmp_path, kind, monkeypatch):
    shown = []
    monkeypatch.setattr(Report, "evaluated", lambda self, evaluation, step: shown.append(evaluation))
    monkeypatch.setattr(Report, "finish", lambda self, prompts: None)
    folder, run = folders(kind), tmp_path / "run"
    size = [f"--rollout.{key}={value}" for key, value in SIZE.items()]
    command = (
        f"--model {folder} --prompts.train {folder / 'prompts.jsonl'} --output_dir {run} --epochs 2 --trackers [] "
        "--policy.lora_rank 4 --policy.lora_alpha 8 --policy.offload --policy.decode_batch_size 2 --reward_frames 1 "
        f"--policy.embeddings_dir {tmp_path / 'embeddings'} --prompts.per_epoch 2 --rollout.group_size 2 "
        "--rollout.batch_size 4 --rollout.num_steps 4 --rollout.guidance_scale 2 --rollout.window_size 2 "
        "--rollout.window_start [1,2] --update.batch_size 4 --update.learning_rate 0.01 --update.kl_weight 0.01 "
        "--evaluation.num_steps 2 --evaluation.images_per_prompt 2 --evaluation.guidance_scale 1"
    ).split()
    assert main([*command, *size, "--rewards", json.dumps({"support.worker_rewards:unlike_source": 1})]) == 0
    saved = run / "checkpoints/checkpoint-4"
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    pipe.load_lora_weights(saved)
    if kind == "experts":
        pipe.load_lora_weights(saved, weight_name=LORA_2, load_into_transformer_2=True)
    policy = load(folder)
    noise = philox_normal(sample_seeds(range(2), 2), 0, (4, *policy.latent_shape(**SIZE)))
    expected = policy.decode(pipeline_latents(pipe, folder, noise, 2, 1.0, [0, 0, 1, 1]))[:, 2]
    images = shown[-1].shown.images.flatten(0, 1)
    assert (images.int() - expected.int()).abs().max() <= 1 and images.float().std() > 5
    assert (images != shown[0].shown.images.flatten(0, 1)).any()
