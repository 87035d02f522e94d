"""--dry_run --fit: the settings that it prints fit, and the smallest change comes first."""

import re
from operator import attrgetter

import pytest
import torch
from support.pipelines import tiny_wan_pipeline
from torch import nn

from fastflowgrpo.config import Config, parse
from fastflowgrpo.errors import UserError
from fastflowgrpo.planning import estimate as estimation
from fastflowgrpo.planning import fit
from fastflowgrpo.planning.estimate import estimate
from fastflowgrpo.planning.fit import fitting
from fastflowgrpo.planning.passes import BatchCost, Passes
from fastflowgrpo.policy import load_policy
from fastflowgrpo.train import main


def command(folder, **settings):
    settings = {
        "model": folder,
        "policy.dtype": "bfloat16",
        "policy.lora_rank": 4,
        "policy.max_sequence_length": 8,
        "prompts.per_epoch": 4,
        "rollout.group_size": 4,
        "rollout.batch_size": 16,
        "rollout.num_steps": 4,
        "rollout.window_size": 2,
        "rollout.window_start": "[0,2]",
        "update.batch_size": 16,
        "evaluation.batch_size": 16,
        **settings,
    }
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def total(config):
    return estimate(config).total_memory(config.policy.gradient_checkpointing)


def stored_bytes(module):
    def size(tensor):
        if type(tensor) is nn.Parameter:  # torchao's are subclasses
            return tensor.nbytes
        names = [*tensor.__tensor_flatten__()[0]]
        return sum(getattr(tensor, name).nbytes for name in names)

    return sum(size(parameter) for parameter in module.parameters())


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("build", [None, tiny_wan_pipeline])
def test_quantised_bytes_are_those_of_the_loaded_model(tiny_sd3_folder, tmp_path, build, kind, rank):
    pytest.importorskip("torchao", reason="torchao is not installed; CI runs this file with it")
    folder, extra = tiny_sd3_folder, {}
    if build is not None:
        folder, extra = tmp_path, {"rollout.height": 16, "rollout.width": 16, "rollout.num_frames": 5}
        build().save_pretrained(folder)
    config = parse(command(folder, **extra, **{"policy.quantization": kind, "policy.lora_rank": rank}))
    policy = load_policy(config.model, config.policy)
    parts = [policy.module, policy.pipeline.vae, *policy.text_encoders().values()]
    frozen = policy.module
    if not rank:
        parts.append(frozen := policy._reference_module)
    # Wan's norms and time embedding stay float32, which the estimate counts in bfloat16.
    float32 = sum(p.nbytes // 2 for p in frozen.parameters() if not p.requires_grad and p.dtype == torch.float32)
    assert estimate(config).memory["weights"] == sum(map(stored_bytes, parts)) - float32


def test_what_is_offloaded_is_counted_where_it_is_used(tiny_sd3_folder):
    plain, offloaded, on_disk, host = (
        estimate(parse(command(tiny_sd3_folder, **settings)))
        for settings in (
            {},
            {"policy.offload": True},
            {"policy.embeddings_dir": "somewhere"},
            {"rollout.offload_trajectory": True, "rollout.batch_size": 4, "update.batch_size": 2},
        )
    )
    vae = 4 * plain.frozen["vae"]
    encoders = 2 * sum(count for name, count in plain.frozen.items() if name.startswith("text_encoder"))
    assert offloaded.memory["weights"] == plain.memory["weights"] - vae - encoders
    assert offloaded.passes["rollout"] == plain.passes["rollout"] + vae
    assert offloaded.passes["encode"] > vae + encoders and "encode" not in plain.passes
    assert on_disk.memory["weights"] == plain.memory["weights"] - encoders
    latent = 4 * 8 * 8 * 2
    assert plain.memory["trajectory"] == 16 * (4 * latent + 2 * 4)
    assert host.memory["trajectory"] == 16 * (latent + 2 * 4) + 4 * 3 * latent
    reference = estimate(parse(command(tiny_sd3_folder, **{"policy.lora_rank": 0, "update.kl_weight": 0.1})))
    moved = estimate(
        parse(command(tiny_sd3_folder, **{"policy.lora_rank": 0, "update.kl_weight": 0.1, "policy.offload": True}))
    )
    # The reference is gone before the trained pass keeps its activations, which take more.
    assert moved.passes["update"] == reference.passes["update"] > 2 * reference.frozen["transformer"]
    assert reference.memory["weights"] - moved.memory["weights"] == vae + encoders + 2 * reference.frozen["transformer"]


@pytest.fixture
def flux_sized(monkeypatch):
    """Passes of a model about as large as FLUX.1, with costs that can be checked by hand."""

    def run(config, sampled, micro_batch, decoded):
        def cost(gigabytes, size):
            return BatchCost(10**12 * size, round(gigabytes * 1e9 * size), 0, size)

        trains_lora = config.policy.lora_rank != 0
        return Passes(
            trained_sizes=(10**8,) if trains_lora else (12 * 10**6,) * 1000,
            frozen={"transformer": 12 * 10**9, "text_encoder": 5 * 10**9, "vae": 10**8},
            linears=((3000, 4000),) * 1000,
            uses_lora=trains_lora,
            latent_shape=(16, 64, 64),
            conditioning=10**6,
            forward=cost(0.1, sampled),
            reference=cost(0.1, sampled),
            train=cost(5, micro_batch),
            checkpointed=cost(0.5, micro_batch),
            decode=cost(0.5, decoded),
            encode=cost(0.05, 1),
        )

    monkeypatch.setattr(estimation, "run_passes", run)
    monkeypatch.setattr(fit, "run_passes", run)


BATCHES = {"rollout.batch_size": 16, "update.batch_size": 4, "policy.decode_batch_size": 8}


LEAN = {"policy.offload": True, "policy.gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [
        (60, {}),
        (50, {"update.batch_size": 2}),
        (45, {"update.batch_size": 1}),
        # the text encoders, 10 GB, are there only while prompts are encoded
        (38, {"update.batch_size": 2, "policy.offload": True}),
        # 12 GB less, with which the encoders may stay
        (31, {"policy.gradient_checkpointing": True, "policy.quantization": "int8"}),
        (27, {**LEAN, "policy.quantization": "int8"}),
        (20, {**LEAN, "policy.quantization": "nf4"}),
    ],
)
def test_the_smallest_change_comes_first_and_what_is_printed_fits(flux_sized, gigabytes, expected):
    found, chosen = fitting(parse(command("some/model", **BATCHES)), 1, gigabytes * 1e9)
    assert chosen == expected
    changed = parse(command("some/model", **{**BATCHES, **chosen}))
    assert changed == found and total(changed) <= gigabytes * 1e9
    for name in chosen.keys() - set(fit.BATCH_SIZES):  # none is superfluous
        assert total(parse(command("some/model", **{**BATCHES, **chosen, name: default(name)}))) > gigabytes * 1e9


def default(name):
    value = attrgetter(name)(Config())
    return "null" if value is None else value


IN_FULL = {"policy.lora_rank": 0, "policy.dtype": "float32", "update.kl_weight": 0.1, "rollout.batch_size": 8}
SMALL_STATE = {"policy.gradient_checkpointing": True, "update.optimizer": "adamw_8bit"}


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [
        (230, {"policy.offload": True, **SMALL_STATE}),
        (210, {**SMALL_STATE, "policy.quantization": "int8"}),  # 12 GB in place of 48
        (190, {"policy.offload": True, **SMALL_STATE, "policy.quantization": "int8"}),
    ],
)
def test_full_training_takes_8_bits_for_the_optimiser_and_then_for_the_reference(flux_sized, gigabytes, expected):
    found, chosen = fitting(parse(command("some/model", **IN_FULL)), 1, gigabytes * 1e9)
    assert chosen == expected and total(found) <= gigabytes * 1e9
    assert total(parse(command("some/model", **IN_FULL, **chosen))) == total(found)


def test_what_cannot_help_is_not_tried(flux_sized):
    full = parse(command("some/model", **{"policy.lora_rank": 0, "update.algorithm": "nft"}))
    names = {name for name, _ in fit._levers(full)}
    names_of_all = {"policy.offload", "policy.embeddings_dir", "policy.gradient_checkpointing", "update.optimizer"}
    assert names == names_of_all
    with_kl = parse(command("some/model", **{"policy.lora_rank": 0, "update.kl_weight": 0.1}))
    assert ("policy.quantization", "int8") in fit._levers(with_kl)
    assert ("policy.quantization", "nf4") not in fit._levers(with_kl)
    with pytest.raises(UserError, match=r"fit: 245 GB are needed with all that saves memory"):
        fitting(full, 1, 24e9)


def test_the_command_prints_the_settings(flux_sized, capsys):
    arguments = command("some/model", dry_run=True, **{"update.batch_size": 0})
    assert main([*arguments, "--fit", "300GB"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert (first, second) == ("fits     300GB with --update.batch_size 16", "some/model on 1 process")
    for value, message in (("24", "fit: must be a size such as 24GB, got 24"), ("1GB", "fit: only --dry_run reads it")):
        with pytest.raises(UserError, match=re.escape(message)):
            parse(command("some/model", fit=value))
