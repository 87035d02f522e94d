"""Families that edit images: the pipeline's own images, what the source changes, and training through the command."""

import json

import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from safetensors.torch import load_file
from support.pipelines import tiny_flux_kontext_pipeline, tiny_sd3_pipeline

from fastflowgrpo import load_policy
from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.embeddings import EmbeddingCache, check_source_images
from fastflowgrpo.policy.latents import pack
from fastflowgrpo.prompts import Prompt, load_prompts
from fastflowgrpo.sampling.ode import sample_ode
from fastflowgrpo.shapes.pretrain_edit import with_source_channels
from fastflowgrpo.train import main

SIZE = {"height": 16, "width": 24}
TEXTS = ["make it red", "remove the dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Kontext pipeline, with prompts.jsonl and two source images of the size of the results."""
    folder = tmp_path_factory.mktemp("kontext")
    tiny_flux_kontext_pipeline().save_pretrained(folder)
    lines = []
    for i, text in enumerate(TEXTS):
        pixels = torch.randint(0, 256, (16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        lines.append(json.dumps({"prompt": text, "image": f"{i}.png"}))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def load(folder, **settings):
    return load_policy(str(folder), PolicyConfig(max_sequence_length=12, lora_rank=4, lora_alpha=8, **settings))


def noise_of(policy):
    return torch.randn(2, *policy.latent_shape(**SIZE), generator=torch.Generator().manual_seed(3))


def sampled(policy, prompts, guidance=1.0):
    noise = noise_of(policy)
    embed = EmbeddingCache(policy, shape=tuple(noise.shape[1:]))
    unconditional = embed([""]) if guidance != 1 else None
    return sample_ode(policy, embed(prompts), 3, noise, unconditional=unconditional, guidance_scale=guidance)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_kontexts_ode_samples_are_the_pipelines_own(folder, guidance):
    policy = load(folder)
    latents = sampled(policy, load_prompts(str(folder / "prompts.jsonl")), guidance)
    pipe = FluxKontextPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = [Image.open(folder / f"{i}.png") for i in range(2)]
    expected = pipe(
        images,
        TEXTS,
        negative_prompt=["", ""],
        true_cfg_scale=guidance,
        num_inference_steps=3,
        latents=pack(noise_of(policy)),
        max_sequence_length=12,
        max_area=SIZE["height"] * SIZE["width"],
        _auto_resize=False,
        output_type="latent",
        **SIZE,
    ).images
    torch.testing.assert_close(pack(latents), expected, rtol=1e-4, atol=1e-5)


def test_each_sample_depends_on_its_own_source(folder):
    policy = load(folder)
    first, second = load_prompts(str(folder / "prompts.jsonl"))
    pairs = ([Prompt("a", image=one.image), Prompt("a", image=first.image)] for one in (first, second))
    both, other = (sampled(policy, pair) for pair in pairs)
    assert (both[0] - other[0]).abs().max() > 1e-3
    torch.testing.assert_close(both[1], other[1])


def test_a_source_is_encoded_once_and_kept_on_disk(folder, tmp_path, monkeypatch):
    policy, calls = load(folder), []
    encode = policy.encode_source
    monkeypatch.setattr(policy, "encode_source", lambda *args: calls.append(args) or encode(*args))
    prompts = load_prompts(str(folder / "prompts.jsonl"))
    shape = policy.latent_shape(**SIZE)
    expected = EmbeddingCache(policy, shape=shape)([prompts[0], prompts[1], prompts[0]])
    assert len(calls) == 2 and torch.equal(expected["source"][0], expected["source"][2])
    cache = EmbeddingCache(policy, tmp_path, shape=shape)
    cache.write([Prompt(""), *prompts, *prompts])
    assert len(list(tmp_path.iterdir())) == 3 and len(calls) == 4
    EmbeddingCache(policy, tmp_path, shape=shape).write(prompts)
    assert len(calls) == 4
    found = cache([prompts[0], prompts[1], prompts[0]])
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in expected.items())
    assert "source" not in cache([""])


def test_source_images_must_fit_the_model(folder, tiny_sd3_folder):
    with pytest.raises(UserError, match=r"edits images, but the prompt 'a cat' has none: give prompts as a \.jsonl"):
        check_source_images(load(folder), [Prompt("a cat")])
    with pytest.raises(UserError, match=r"the prompt 'make it red' has a source image, but the model makes images"):
        check_source_images(load(tiny_sd3_folder), load_prompts(str(folder / "prompts.jsonl")))


def test_source_channels_change_nothing_before_they_are_trained():
    transformer = tiny_sd3_pipeline().transformer
    latents, source = torch.randn(2, 2, 4, 8, 8).unbind()
    inputs = {
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([300.0, 700.0]),
        "return_dict": False,
    }
    with torch.no_grad():
        wider = with_source_channels(transformer)(torch.cat([latents, source], 1), **inputs)[0]
        torch.testing.assert_close(wider, transformer(latents, **inputs)[0])


def test_the_command_trains_a_lora_that_kontext_loads(folder, tmp_path):
    run = tmp_path / "run"
    command = (
        f"--model {folder} --prompts.train {folder / 'prompts.jsonl'} --output_dir {run} --epochs 1 --trackers [] "
        "--policy.lora_rank 4 --policy.max_sequence_length 12 --rollout.height 16 --rollout.width 24 "
        "--prompts.per_epoch 2 --rollout.group_size 2 --rollout.batch_size 4 --rollout.num_steps 3 "
        "--rollout.guidance_scale 2 --rollout.window_size 1 --rollout.window_start [0,1] --update.batch_size 4 "
        "--update.kl_weight 0.01 --update.learning_rate 0.01 --evaluation.num_steps 2 --evaluation.images_per_prompt 1"
    ).split()
    assert main([*command, "--rewards", json.dumps({"support.worker_rewards:unlike_source": 1})]) == 0
    saved = run / "checkpoints/checkpoint-2"
    weights = load_file(saved / "pytorch_lora_weights.safetensors")
    assert sum(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name) > 10
    FluxKontextPipeline.from_pretrained(folder).load_lora_weights(saved)
    card = (saved / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card and "image = pipe(image=source_image, prompt=prompt, " in card
