"""Whole epochs on a pretended GPU: devices, waits of the host and races of every operation, without a GPU."""

import math
from functools import wraps

import pytest
import torch
from support.edit_prompts import write_prompts
from support.fake_gpu import CUDA, FakeGpu
from support.pipelines import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_edit_plus_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)

import fastflowgrpo.trainer
from fastflowgrpo import Config, Trainer
from fastflowgrpo.config import EvaluationConfig, PolicyConfig, PromptsConfig, RolloutConfig, UpdateConfig
from fastflowgrpo.kernels.grpo_loss import grpo_step_loss
from fastflowgrpo.learning import OBJECTIVES, policy_gradient
from fastflowgrpo.sampling.groups import GroupSampler
from fastflowgrpo.scoring import pipeline

SIZES = {
    "sd3": (tiny_sd3_pipeline, {"height": 16, "width": 16}),
    "flux": (tiny_flux_pipeline, {"height": 16, "width": 16}),
    "qwen": (tiny_qwen_image_pipeline, {"height": 16, "width": 16}),
    "zimage": (tiny_z_image_pipeline, {"height": 16, "width": 16}),
    "klein": (tiny_flux2_klein_pipeline, {"height": 16, "width": 16}),
    "wan": (tiny_wan_pipeline, {"height": 16, "width": 16, "num_frames": 3}),
    "plus": (tiny_qwen_image_edit_plus_pipeline, {"height": 16, "width": 16}),
}
SOURCES = {"plus": 2, "klein": 1}  # images of a prompt
ONCE_PER_PASS = ("transformer_qwenimage.compute_text_seq_len_from_mask", "z_image.predict")
"""Known waits: for a number that diffusers copies to the device, and for the lengths of Z-Image's prompts."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            SIZES[family][0]().save_pretrained(made[family])
            write_prompts(made[family], ["a cat", "two dogs"], 16, 16, SOURCES.get(family, 0))
        return made[family]

    return folder


@pytest.fixture
def gpu(monkeypatch):
    """The device of the trainer; the steps of rollout and update may not wait for it."""
    gpu = FakeGpu(monkeypatch, pipeline, may_wait=ONCE_PER_PASS)
    make = fastflowgrpo.trainer.make_accelerator

    def on_gpu(*arguments):
        accelerator = make(*arguments)
        monkeypatch.setattr(accelerator.state, "device", CUDA)
        return accelerator

    def in_step_loop(owner, name):
        function = getattr(owner, name)

        @wraps(function)
        def inside(*args, **kwargs):
            with gpu.step_loop():
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, inside)

    monkeypatch.setattr(fastflowgrpo.trainer, "make_accelerator", on_gpu)
    monkeypatch.setattr(fastflowgrpo.trainer, "warn_if_short", lambda *_: None)  # asks the driver
    monkeypatch.setenv("FASTFLOWGRPO_BACKEND", "reference")
    in_step_loop(GroupSampler, "sample")
    in_step_loop(fastflowgrpo.trainer.Processes, "backward")
    for objective in {base for cls in OBJECTIVES.values() for base in cls.__mro__ if "loss" in vars(base)}:
        in_step_loop(objective, "loss")
    return gpu


def config_of(folder, output, family, algorithm="grpo", rank=4):
    if OBJECTIVES[algorithm].uses_log_probs:
        rollout = {"window_size": 1, "window_start": (0, 1), "guidance_scale": 2.0}
    else:
        rollout = {"dynamics": "ode"}
    return Config(
        model=str(folder),
        output_dir=str(output / "run"),
        trackers=[],
        reward_frames=2,
        policy=PolicyConfig(lora_rank=rank, lora_alpha=8, max_sequence_length=12, dtype="bfloat16"),
        prompts=PromptsConfig(train=str(next(folder.glob("prompts.*"))), per_epoch=2),
        rollout=RolloutConfig(group_size=2, num_steps=2, batch_size=2, **rollout, **SIZES[family][1]),
        update=UpdateConfig(algorithm=algorithm, batch_size=2, per_epoch=1, ema_decay=0.5),
        rewards={"jpeg_compressibility": 1},
        evaluation=EvaluationConfig(num_steps=2, images_per_prompt=1),
    )


def train(config, gpu):
    with gpu.active():
        trainer = Trainer(config)
        trainer._sample_evaluation()  # a run begins with it; FLUX then copies its positions, once
        batch, _ = trainer.collect(0)
        metrics = trainer.learner.update(batch)
    assert gpu.races == gpu.errors == []
    return metrics


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of float32 norms: slower
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", SIZES)
def test_families(folders, tmp_path, gpu, family, rank):
    train(config_of(folders(family), tmp_path, family, rank=rank), gpu)


@pytest.mark.parametrize("algorithm", [name for name in OBJECTIVES if name != "grpo"])
def test_algorithms(folders, tmp_path, gpu, algorithm):
    rank = 4 * (list(OBJECTIVES).index(algorithm) % 2)  # a LoRA or all weights, in turn
    train(config_of(folders("sd3"), tmp_path, "sd3", algorithm, rank), gpu)


def wait_for_the_loss(loss, statistics):
    return loss * float(loss.mean() < math.inf), statistics


def add_a_tensor_of_the_host(loss, statistics):
    return loss + torch.ones(len(loss)), statistics


def copy_the_loss(loss, statistics):
    return loss, statistics | {"copy": loss.detach().cpu()}


@pytest.mark.parametrize("change", [wait_for_the_loss, add_a_tensor_of_the_host, copy_the_loss])
def test_what_a_gpu_would_refuse_or_wait_for_is_found(folders, tmp_path, gpu, change, monkeypatch):
    monkeypatch.setattr(policy_gradient, "grpo_step_loss", lambda *args, **kw: change(*grpo_step_loss(*args, **kw)))
    with pytest.raises(AssertionError, match=r"different devices|the host waits"):
        train(config_of(folders("sd3"), tmp_path, "sd3"), gpu)
