"""--dry_run: the batch plan against groups assigned by hand, and the estimate against a real epoch."""

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import prod
from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image
from support.pipelines import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_wan_experts_pipeline,
    tiny_wan_image_to_video_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastflowgrpo import Trainer, train
from fastflowgrpo.config import (
    Config,
    EvaluationConfig,
    PolicyConfig,
    PromptsConfig,
    RolloutConfig,
    UpdateConfig,
    parse,
    validate,
)
from fastflowgrpo.errors import UserError
from fastflowgrpo.planning import meter
from fastflowgrpo.planning.estimate import estimate
from fastflowgrpo.planning.meter import measure
from fastflowgrpo.planning.micro_batch import available_memory, with_largest_micro_batch
from fastflowgrpo.planning.passes import run_passes
from fastflowgrpo.planning.plan import batch_plan
from fastflowgrpo.planning.published_models import PUBLISHED
from fastflowgrpo.policy import load_policy

aten = torch.ops.aten
# The counter does not know fused attention on CPUs, which has the same products as on GPUs.
ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


def config_of(output="unused", *, model="shapes", rank=4, guidance=4.5, kl_weight=0.04, window=2, **settings):
    config = Config(
        model=str(model),
        output_dir=str(output),
        trackers=[],
        policy=PolicyConfig(lora_rank=rank, lora_alpha=8),
        prompts=PromptsConfig(per_epoch=4),
        rollout=RolloutConfig(
            group_size=4,
            num_steps=5,
            window_size=window,
            window_start=(0, 3),
            guidance_scale=guidance,
            batch_size=8,
        ),
        update=UpdateConfig(per_epoch=2, batch_size=6, kl_weight=kl_weight, learning_rate=1e-5),
        rewards={"jpeg_compressibility": 1},
        evaluation=EvaluationConfig(batch_size=8),
        **settings,
    )
    validate(config)
    return config


@pytest.mark.parametrize("groups", [2, 12, 48])
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("processes", [1, 2, 3, 5, 6, 8, 24])
@pytest.mark.parametrize("window", [2, None])
def test_plan_equals_groups_assigned_by_hand(groups, updates, processes, window):
    config = config_of(window=window)
    config.prompts.per_epoch, config.update.per_epoch = groups, updates
    if processes > groups // updates:
        with pytest.raises(UserError, match=rf"{groups // updates} an update, fewer than the {processes} processes"):
            batch_plan(config, processes)
        return
    plan = batch_plan(config, processes)
    steps = 2 if window else 4
    owner = [group % processes for group in range(groups)]
    counts = Counter(owner)
    assert plan.groups_per_process == (min(counts.values()), max(counts.values()))
    sampled = [4] * max(counts.values())
    batches = [sum(sampled[i : i + 2]) for i in range(0, len(sampled), 2)]
    assert (plan.rollout_batches, plan.rollout_batch_size) == (len(batches), max(batches))
    share = groups // updates
    each = [
        Counter(owner[begin : begin + share])[rank] for begin in range(0, groups, share) for rank in range(processes)
    ]
    assert plan.update_groups_per_process == (min(each), max(each))
    pairs = [None] * (max(each) * 4 * steps)
    micro = [len(pairs[i : i + 6]) for i in range(0, len(pairs), 6)]
    assert (plan.micro_batches, plan.micro_batch_size) == (len(micro), max(micro))
    assert (plan.images, plan.pairs) == (groups * 4, groups * 4 * steps)
    assert plan.utilization == pytest.approx(share / processes / max(each))
    assert ("uneven" in "\n".join(plan.summary_lines())) == (len(set(each)) > 1)


@pytest.mark.parametrize(
    "rank, guidance, kl_weight, algorithm",
    [
        (4, 4.5, 0.04, "grpo"),
        (0, 1.0, 0.0, "grpo_guard"),
        (4, 4.5, 0.0, "dpo"),
        (4, 4.5, 0.0, "sft"),
        (4, 1.0, 0.0, "rwr"),
        (4, 1.0, 0.1, "nft"),
        (0, 1.0, 0.0, "awm"),
        (4, 1.0, 0.0, "dgpo"),
    ],
)
def test_parameters_and_flops_are_those_of_a_real_epoch(
    tiny_sd3_folder, rank, guidance, kl_weight, algorithm, tmp_path
):
    config = config_of(tmp_path / "run", model=tiny_sd3_folder, rank=rank, guidance=guidance, kl_weight=kl_weight)
    config.update.algorithm = algorithm
    config.update.noise_draws = 1 if algorithm.startswith("grpo") else 2
    validate(config)
    found = estimate(config)
    trainer = Trainer(config)
    policy = trainer.policy
    assert found.trained == sum(parameter.numel() for parameter in trainer.learner.parameters)
    parts = {name: part for name, part in policy.pipeline.components.items() if isinstance(part, nn.Module)}
    count = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    count["transformer"] -= found.trained if rank else 0
    assert found.frozen == count

    trainer.embed([prompt.text for prompt in trainer.epoch_prompts(0)] + [""])  # the estimate leaves text encoders out
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as sampling:
        batch, _ = trainer.collect(0)
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as updating:
        metrics = trainer.learner.update(batch)
    trainer.accelerator.end_training()
    assert metrics["trained_pairs"] == found.plan.pairs
    assert found.flops["rollout"] + found.flops["decode"] == sampling.get_total_flops()
    old_policy = found.flops.get("old policy", 0)
    assert found.flops["update"] + found.flops["reference"] + old_policy == updating.get_total_flops()
    assert (old_policy > 0) == ("old policy" in found.memory) == (algorithm in ("nft", "awm", "dgpo"))
    assert (found.flops["reference"] > 0) == (kl_weight > 0 or algorithm in ("dpo", "dgpo"))


@pytest.mark.parametrize(("candidates", "groups", "largest"), [(6, 4, 6), (12, 4, 8), (5, 1, 5)])
def test_flops_of_candidates_are_those_of_a_real_epoch(tiny_sd3_folder, candidates, groups, largest, tmp_path):
    config = config_of(tmp_path / "run", model=tiny_sd3_folder)
    config.prompts.per_epoch, config.update.per_epoch = groups, 1
    config.rollout.candidates, config.rollout.candidate_steps = candidates, 2
    validate(config)
    found = estimate(config)
    trainer, passes = Trainer(config), []
    trainer.policy.module.register_forward_hook(lambda module, inputs, output: passes.append(len(output[0])))
    trainer.embed([prompt.text for prompt in trainer.epoch_prompts(0)] + [""])
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as sampling:
        trainer.collect(0)
    trainer.accelerator.end_training()
    assert sum(found.flops[name] for name in ("candidates", "rollout", "decode")) == sampling.get_total_flops()
    rows = groups * candidates * 2 * 2  # 2 steps of 2 branches
    explored = [size for size, total in zip(passes, accumulate(passes), strict=True) if total <= rows]
    assert sum(explored) == rows and found.plan.candidate_batch_size == max(explored) == largest
    line = f"explore  {groups} groups a process, {groups * candidates} candidates in batches of {largest}; the 2 best"
    assert line in str(found)


def test_flops_of_fewer_passes_are_those_of_a_real_epoch(tiny_sd3_folder, tmp_path):
    """Unconditional velocities kept for the first of two updates, and the reference on a third of the pairs, for a norm
    guard as for a KL."""
    config = config_of(tmp_path / "run", model=tiny_sd3_folder, rank=4, guidance=4.5, kl_weight=0.0)
    config.rollout.keep_unconditional, config.update.kl_share = True, 1 / 3
    config.update.norm_guard_weight = 0.1
    validate(config)
    with_kl = replace(config, update=replace(config.update, norm_guard_weight=0.0, kl_weight=0.1))
    assert estimate(with_kl).flops == estimate(config).flops
    found, plain = (
        estimate(config),
        estimate(replace(config, rollout=replace(config.rollout, keep_unconditional=False))),
    )
    trainer = Trainer(config)
    batch, _ = trainer.collect(0)
    batch.advantages[:] = 1.0  # none is left out
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as updating:
        trainer.learner.update(batch)
    trainer.accelerator.end_training()
    assert found.flops["update"] + found.flops["reference"] == updating.get_total_flops()
    assert found.flops["update"] < plain.flops["update"]
    assert found.memory["trajectory"] > plain.memory["trajectory"]


@pytest.mark.parametrize("stride", [0, 1])
def test_flops_of_shared_passes_and_a_short_tail_are_those_of_real_epochs(tiny_sd3_folder, tmp_path, stride):
    """Of as many epochs as give each first step of a window equally often, or of those of a sliding window."""
    config = config_of(tmp_path / "run", model=tiny_sd3_folder, kl_weight=0.0, epochs=2)
    config.rollout.same_noise, config.rollout.tail_steps, config.rollout.num_steps = True, 1, 6
    config.rollout.window_start, config.rollout.window_stride = (1, 3), stride
    validate(config)
    found = estimate(config)
    trainer = Trainer(config)
    starts = iter([1, 2, 2, 2, 1, 1, 1, 2])
    if not stride:
        trainer.sampler.starts = lambda epoch, seeds: [next(starts) for _ in seeds]
    trainer.embed(["", *(prompt.text for epoch in range(2) for prompt in trainer.epoch_prompts(epoch))])
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as sampling:
        for epoch in range(2):
            batch, _ = trainer.collect(epoch)
    batch.advantages[:] = 1.0  # none is left out
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as updating:
        trainer.learner.update(batch)
    trainer.accelerator.end_training()
    assert found.flops["update"] == updating.get_total_flops()
    assert 2 * (found.flops["rollout"] + found.flops["decode"]) == sampling.get_total_flops()


@pytest.mark.parametrize(
    ("build", "targets", "rank"),
    [
        (tiny_flux_pipeline, ["to_q"], 4),
        (tiny_qwen_image_pipeline, ["to_q", "to_add_out"], 4),
        (tiny_wan_pipeline, None, 4),
        (tiny_wan_experts_pipeline, None, 4),
        (tiny_wan_image_to_video_pipeline, None, 4),
        (partial(tiny_wan_image_to_video_pipeline, "wan22_5b"), None, 4),
        (tiny_z_image_pipeline, None, 4),
        (tiny_flux2_klein_pipeline, None, 4),
        (tiny_flux_pipeline, None, 0),
        (tiny_qwen_image_pipeline, None, 0),
        (tiny_wan_pipeline, None, 0),
    ],
)
def test_a_pass_of_each_family_is_the_real_one(build, targets, rank, tmp_path):
    build().save_pretrained(tmp_path)
    Image.new("RGB", (32, 16), "red").save(tmp_path / "source.png")
    config = config_of(rank=rank)
    config.model = str(tmp_path)
    config.policy.lora_targets = targets
    config.policy.max_sequence_length = 512 if build is tiny_wan_image_to_video_pipeline else 12
    config.policy.offload = True  # for the cost of the encoders
    config.rollout.height, config.rollout.width = 16, 32
    config.rollout.num_frames = 5 if "wan" in str(build) else None
    found = run_passes(config, 2, 3, 1)
    assert found.encode.flops > 0
    policy = load_policy(config.model, config.policy)
    assert found.trained == sum(parameter.numel() for parameter in policy.trainable_parameters())
    shape, text = policy.latent_shape(16, 32, config.rollout.num_frames), "two cats on a hill"
    if policy.edits_images:
        one = policy.encode_edit(text, [tmp_path / "source.png"], shape)
        conditioning = {name: tensor.expand(3, *tensor.shape[1:]) for name, tensor in one.items()}
    else:
        conditioning = policy.encode([text] * 3)
    assert prod(found.latent_shape) == prod(shape)
    assert found.conditioning == sum(tensor[0].nbytes for tensor in conditioning.values())
    latents, sigma = torch.randn(3, *shape), torch.full((3,), 0.5)

    def flops(count, *, backward=False):
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counted, torch.set_grad_enabled(backward):
            rows = {name: tensor[:count] for name, tensor in conditioning.items()}
            velocity = policy.velocity(latents[:count], sigma[:count], rows)
            if backward:
                velocity.sum().backward()
        return counted.get_total_flops()

    assert found.forward.flops == flops(2)
    assert found.train.flops == flops(3, backward=True)
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counted:
        policy.decode(latents[:1])
    assert found.decode.flops == counted.get_total_flops()


@pytest.mark.parametrize("build", [tiny_flux_pipeline, tiny_qwen_image_pipeline])
def test_what_is_remembered_of_an_operation_changes_no_pass(build, tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    config = config_of()
    config.model, config.policy.offload, config.policy.dtype = str(tmp_path), True, "bfloat16"
    config.rollout.height, config.rollout.width = 16, 32
    found = run_passes(config, 2, 3, 1)
    monkeypatch.setattr(meter, "_returns_new_tensors", lambda func: False)  # nothing is remembered
    assert run_passes(config, 2, 3, 1) == found


def test_an_operation_is_remembered_by_shapes_dtypes_and_types():
    small, large = (torch.zeros(count, 1000, dtype=torch.int8, device="meta") for count in (1, 3))

    def add():
        return small + 1, small + 1.0, small + 1, small.short() + 1, large + 1, large.t() + small.t()

    # int8, float32, int8, int16, int8, int8
    assert measure(add).peak == 1000 * (1 + 4 + 1 + 2 + 3 + 3)


def test_published_transformers_have_the_sizes_in_their_names():
    sizes = {
        "stabilityai/stable-diffusion-3.5-large": 8.1,
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": 16.4,
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 14.3,
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 14.3,
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 5,
        "Tongyi-MAI/Z-Image": 6,
        "black-forest-labs/FLUX.2-dev": 32,
        "black-forest-labs/FLUX.2-klein-4B": 4,
        "black-forest-labs/FLUX.2-klein-9B": 9,
    }
    for model, billions in sizes.items():
        name, config = PUBLISHED[model]["transformer"]
        with torch.device("meta"):
            transformer = getattr(diffusers, name)(**config)
        assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(1e9 * billions, rel=0.04), model


def test_memory_of_a_pass_is_that_of_real_tensors():
    config = config_of(rank=0)
    found = estimate(config)
    policy = load_policy("shapes", config.policy)
    for parameter in policy.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    latents, sigma = torch.zeros(6, *policy.latent_shape(None, None)), torch.ones(6)
    conditioning = policy.encode([""] * 6)

    def update():
        velocity = policy.velocity(latents, sigma, conditioning)
        velocity.backward(torch.ones_like(velocity))

    assert found.passes["update"] == pytest.approx(measure(update).peak, rel=0.02)
    policy.module.enable_gradient_checkpointing()
    checkpointed = measure(update).peak
    assert found.passes["update with gradient checkpointing"] == pytest.approx(checkpointed, rel=0.02)
    assert 1.5 * checkpointed < found.passes["update"]


def test_gradient_checkpointing_costs_about_one_more_forward_pass():
    found = estimate(config_of(guidance=1.0, kl_weight=0.0))
    forward = found.flops["rollout"] / (found.plan.images * 5) * found.plan.pairs
    assert 0.9 * forward < found.flops["checkpointing"] <= forward


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_tensors(device):
    mega = torch.zeros(500, 500, device=device, requires_grad=True)  # 1 MB
    mega.grad = torch.zeros_like(mega)

    def chain():  # a result of 1 MB at a time beside the one that it is made of
        with torch.no_grad():
            x = mega + 1
            for _ in range(5):
                x = x + 1

    def graph():  # the product keeps both factors
        x = mega * 2
        y = x * x
        z = y * y
        z.backward(mega.detach())

    def nothing():
        mega.detach().view(-1)[10:].unflatten(0, (-1, 5)).zero_()

    assert measure(chain).peak == 2e6
    # x, y, z, the gradients of both factors y, and their sum
    assert measure(graph).peak == 6e6
    assert measure(nothing).peak == 0


def test_fused_attention_is_counted_and_keeps_no_scores():
    query = torch.zeros(2, 4, 256, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    query.grad = torch.zeros_like(query)
    product = 2 * 2 * 4 * 256 * 256 * 64

    def masked():
        mask = torch.ones(2, 1, 1, 256, dtype=torch.bool, device="meta")
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask).sum().backward()

    plain = measure(lambda: F.scaled_dot_product_attention(query, query, query).sum().backward())
    assert plain.flops == (2 + 5) * product
    assert measure(masked).flops == plain.flops
    assert plain.peak < 6 * query.numel() * 2  # 4 x 256 x 256 scores alone would be 4 times that of a query


def test_memory_adds_up():
    config = config_of(rank=4)
    found = estimate(config)
    latent = 8 * 3 * 3 * 4  # bytes
    memory = found.memory
    assert memory["gradients"] == memory["average"] == memory["optimiser"] / 2 == 4 * found.trained
    assert memory["weights"] == 4 * (found.trained + sum(found.frozen.values()))
    # a window of 2 steps has 3 latents, and the image is a fourth
    assert memory["trajectory"] == 16 * (4 * latent + 2 * 4)
    passes = max(found.passes["rollout"], found.passes["update"])
    assert found.total_memory() == sum(memory.values()) + passes
    config.update.ema_decay = 0.0
    assert estimate(config).memory["average"] == 0
    kept = estimate(replace(config, update=replace(config.update, trust_region="divergence"))).memory["trajectory"]
    assert kept == memory["trajectory"] + 16 * 2 * latent  # a velocity for each trained step, in float32 with guidance
    ahead = estimate(replace(config, rollout=replace(config.rollout, ahead=2)))
    assert ahead.memory == estimate(config).memory | {"ahead": memory["trajectory"] / 2}
    assert ahead.passes["update"] == found.passes["update"] + run_passes(config, 8, 6, 8).decode.peak
    assert "ahead    2 groups a process of the next epoch, 8 images" in str(ahead)
    halves = estimate(config, processes=2)
    assert halves.memory["trajectory"] == memory["trajectory"] / 2
    assert halves.flops == found.flops


@pytest.mark.parametrize(("algorithm", "checkpointing"), [("grpo", False), ("dpo", True)])
def test_the_largest_micro_batch_fits_and_a_larger_one_would_not(algorithm, checkpointing):
    config = config_of(kl_weight=0.0)
    config.update.algorithm, config.policy.gradient_checkpointing = algorithm, checkpointing
    config.prompts.per_epoch, config.update.noise_draws = 40, 1 if algorithm == "grpo" else 6
    config.rollout.batch_size = config.evaluation.batch_size = 4
    config.update.batch_size = 0
    validate(config)
    memory = 40e6
    state = torch.get_rng_state()
    config = with_largest_micro_batch(config, 1, memory)
    assert torch.equal(torch.get_rng_state(), state)
    found = estimate(config)
    plan = found.plan
    assert plan.micro_batches > 2
    assert 0 <= plan.micro_batch_size * plan.micro_batches - plan.pairs / plan.updates < plan.micro_batches
    assert found.total_memory(checkpointing) <= memory
    config.update.batch_size = -(-plan.pairs // plan.updates // (plan.micro_batches - 1))
    config.update.batch_size *= 2 if algorithm == "dpo" else 1
    larger = estimate(config)
    assert larger.plan.micro_batches == plan.micro_batches - 1
    assert larger.total_memory(checkpointing) > memory
    with pytest.raises(UserError, match=r"update.batch_size: one pair at a time already needs 0\.\d+ GB of 0.02 GB"):
        with_largest_micro_batch(config, 1, 20e6)


def test_memory_that_a_process_may_fill(monkeypatch):
    config = config_of()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10e9))
    assert available_memory(config) == 9e9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_memory(config) == 4.5e9
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (70e9, 80e9))
    assert available_memory(config) == 63e9
    config.memory_gb = 2.5
    assert available_memory(config) == 2.5e9


def test_dry_run_says_which_micro_batch_it_chose(capsys):
    assert train.main(["--dry_run", "--update.batch_size", "0", "--memory_gb", "0.2"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    size = int(re.fullmatch(r"chosen   update.batch_size (\d+), by 0.2 GB of memory a process", first)[1])
    (line,) = [line for line in rest if line.startswith("update ")]
    assert line.endswith(f"micro-batches of {size}") and 1 < size < 864


def test_the_vae_and_the_text_encoders_are_counted_in_their_dtypes():
    config = config_of(rank=4)
    single = estimate(config)
    encoders = sum(count for name, count in single.frozen.items() if name.startswith("text_encoder"))
    config.policy.vae_dtype, config.policy.text_encoder_dtype = "bfloat16", "float16"
    half = estimate(config)
    assert single.memory["weights"] - half.memory["weights"] == 2 * (single.frozen["vae"] + encoders)
    decode = single.passes["rollout"] - half.passes["rollout"]
    assert decode == pytest.approx(run_passes(config, 8, 6, 8).decode.peak, rel=0.1)  # the half that is saved
    assert half.passes["update"] == single.passes["update"] and half.flops == single.flops


def test_full_training_in_bfloat16_has_float32_weights_a_reference_and_a_copy():
    config = config_of(rank=0)
    single = estimate(config)
    config.policy.dtype = "bfloat16"
    half = estimate(config)
    assert single.trained == single.frozen["transformer"]
    assert half.memory["weights"] == 4 * half.trained + 2 * sum(half.frozen.values()) + 2 * half.frozen["vae"]
    assert half.flops == single.flops
    assert half.passes["update"] == pytest.approx(single.passes["update"] / 2 + 2 * half.trained, rel=0.1)


def test_a_lora_to_continue_from_is_estimated_as_the_run_loads_it(tmp_path):
    config = config_of()
    config.policy.lora_targets = ["attn.to_q"]
    policy = load_policy("shapes", config.policy)
    policy.save(tmp_path)
    trained = sum(parameter.numel() for parameter in policy.trainable_parameters())
    config.policy = PolicyConfig(lora=str(tmp_path))  # without a rank the bundled model is trained in full
    assert estimate(config).trained == trained
    config.policy.lora = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"policy\.lora: .*nowhere cannot be loaded"):
        estimate(config)


@pytest.mark.parametrize("build", [tiny_qwen_image_pipeline, tiny_wan_pipeline])
def test_full_training_in_bfloat16_counts_autocasts_copy_in_every_family(build, tmp_path):
    """Qwen-Image's last block has weights that stay frozen."""
    build().save_pretrained(tmp_path)
    config = config_of(rank=0)
    config.model = str(tmp_path)
    config.policy.dtype, config.policy.max_sequence_length = "bfloat16", 12
    config.rollout.height, config.rollout.width = 16, 32
    config.rollout.num_frames = 5 if build is tiny_wan_pipeline else None
    found, passes = estimate(config), run_passes(config, 8, 6, 8)
    assert found.trained <= found.frozen["transformer"]
    assert found.passes["update"] == passes.train.peak + 2 * found.trained
    assert found.passes["rollout"] == passes.forward.peak + passes.decode.peak + 2 * found.trained


def test_dry_run_prints_and_writes_nothing(tmp_path, capsys, monkeypatch):
    output = tmp_path / "run"
    for argv in (["--dry_run"], ["--dry_run", "true"], ["--dry_run=true"]):
        assert train.main([*argv, "--output_dir", str(output)]) == 0
        text = capsys.readouterr().out
        assert text.startswith("shapes on 1 process\nimages   24 groups x 24 = 576 an epoch, 3 trained steps of each")
        assert re.search(r"\n  at most +\d+\.\d MB\n", text) and re.search(r"\n  all +\d+\.\d GFLOP\n", text)
    assert train.main(["--dry_run", "--num_processes", "5"]) == 0
    assert "shapes on 5 processes" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train.main(["--dry_run"]) == 0
    assert "shapes on 4 processes" in capsys.readouterr().out
    assert not output.exists()


def test_an_estimate_draws_no_random_numbers():
    state = torch.get_rng_state()
    estimate(Config())
    assert torch.equal(torch.get_rng_state(), state)


def test_switches_without_a_value():
    assert parse(["--dry_run"]).dry_run and parse(["--overwrite", "--seed", "3"]).overwrite
    assert not parse(["--dry_run", "false"]).dry_run and not parse(["--overwrite=false"]).overwrite
    assert parse(["--seed", "3", "--overwrite"]).seed == 3


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num_processes", "13"], "24 groups in 2 updates are 12 an update, fewer than the 13 processes"),
        (["--model", "nobody/nothing"], 'model "nobody/nothing" is neither a diffusers folder nor a hub id'),
        (["--policy.lora_rank", "4", "--policy.lora_targets", "[nothing]"], "policy.lora_targets: "),
    ],
)
def test_dry_run_errors(argv, message, capsys):
    assert train.main(["--dry_run", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
