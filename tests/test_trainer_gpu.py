"""Epochs on a real GPU, decoding and scoring on their own streams; `benchmarks/gpu.sh` runs them under sanitizers."""

import pytest
import torch
from support.edit_prompts import write_prompts
from support.pipelines import (
    tiny_flux2_klein_pipeline,
    tiny_flux_kontext_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_edit_pipeline,
    tiny_qwen_image_edit_plus_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)

import fastflowgrpo.trainer
from fastflowgrpo import Config, Trainer
from fastflowgrpo.config import PolicyConfig, PromptsConfig, RolloutConfig, UpdateConfig
from fastflowgrpo.rewards import WeightedRewards

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BUILD = {
    "sd3": (tiny_sd3_pipeline, {}),
    "flux": (tiny_flux_pipeline, {}),
    "qwen": (tiny_qwen_image_pipeline, {}),
    "zimage": (tiny_z_image_pipeline, {}),
    "klein": (tiny_flux2_klein_pipeline, {}),
    "wan": (tiny_wan_pipeline, {"num_frames": 3}),
    "kontext": (tiny_flux_kontext_pipeline, {}),
    "edit": (tiny_qwen_image_edit_pipeline, {}),
    "plus": (tiny_qwen_image_edit_plus_pipeline, {}),
}
SOURCES = {"kontext": 1, "edit": 1, "plus": 2, "klein": 2}  # images of a prompt


def level(batch):
    return batch.images.float().flatten(1).mean(1)


def level_on_gpu(batch):
    return level(batch)


level_on_gpu.device = "cuda"


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", BUILD)
def test_an_epoch_on_a_gpu(tmp_path, family, rank, monkeypatch):
    build, size = BUILD[family]
    build().save_pretrained(tmp_path / "model")
    prompts = write_prompts(tmp_path, ["a cat", "two dogs", "snow", "a hill"], 16, 16, SOURCES.get(family, 0))
    rewards = WeightedRewards({"host": level, "device": level_on_gpu}, {"host": 1.0, "device": 1.0})
    monkeypatch.setattr(fastflowgrpo.trainer, "build_rewards", lambda settings: rewards)
    config = Config(
        model=str(tmp_path / "model"),
        output_dir=str(tmp_path / "run"),
        trackers=[],
        policy=PolicyConfig(lora_rank=rank, lora_alpha=8, max_sequence_length=12, dtype="bfloat16"),
        prompts=PromptsConfig(train=str(prompts), per_epoch=4),
        rollout=RolloutConfig(
            group_size=2, num_steps=3, window_size=1, window_start=(0, 1), batch_size=2, height=16, width=16, **size
        ),
        update=UpdateConfig(batch_size=2, per_epoch=2),
    )
    trainer = Trainer(config)
    for epoch in range(2):
        batch, metrics = trainer.collect(epoch)
        assert metrics["missing"] == 0
        assert metrics["host"] == pytest.approx(metrics["device"], rel=1e-4), "both rewards saw the same images"
        assert trainer.learner.update(batch)["grad_norm"] > 0
