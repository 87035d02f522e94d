"""--dry_run --gpu: the least seconds of an epoch on a GPU, against numbers written out."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastflowgrpo import train
from fastflowgrpo.config import parse
from fastflowgrpo.planning.estimate import estimate
from fastflowgrpo.planning.meter import measure
from fastflowgrpo.planning.roofline import CARDS, Card, Work, roofline_table


def test_a_phase_takes_the_longer_of_its_flops_and_its_bytes():
    card = Card(half=100.0, tf32=50.0, bandwidth=10.0)
    assert Work(flops=600, passes=2, weights=20, dtype="bfloat16").least_seconds(card) == 6  # bytes: 4
    assert Work(flops=600, passes=2, weights=20, dtype="float16").least_seconds(card) == 6
    assert Work(flops=600, passes=2, weights=20, dtype="float32").least_seconds(card) == 12
    assert Work(flops=600, passes=4, weights=20, dtype="bfloat16").least_seconds(card) == 8  # flops: 6


def test_a_table_written_out():
    work = {
        "rollout": Work(flops=312e12, passes=100, weights=10**9, dtype="bfloat16"),
        "decode": Work(flops=312e12, passes=1, weights=10**9, dtype="float32"),
        "update": Work(flops=1e12, passes=1000, weights=2_039_000_000, dtype="bfloat16"),
    }
    title, columns, *rows = roofline_table(work, 8, "a100").splitlines()
    assert title.endswith("(312 TFLOP/s, in float32 156, 2.039 TB/s): a bound, not a forecast")
    assert columns.split() == ["share", "of", "these", "rates", "100", "%", "40", "%"]
    assert [row.split() for row in rows] == [
        ["rollout,", "s", "1", "2.5"],
        ["decode,", "s", "2", "5"],
        ["update,", "s", "1", "2.5"],
        ["all,", "s", "4", "10"],
        ["images/s", "2", "0.8"],
    ]


def test_the_weights_of_a_pass_are_read_once():
    table, layer = nn.Embedding(1000, 8, device="meta"), nn.Linear(8, 8, device="meta", dtype=torch.float32)
    ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    twice = measure(lambda: layer(layer(table(ids))).sum().backward())
    assert twice.weights == (8 * 8 + 8) * 4


def test_the_work_of_an_epoch_written_out():
    """The bundled model in two processes: 5 groups, of which one process has 3."""
    settings = "--gpu h100 --prompts.per_epoch 5 --update.per_epoch 1 --rollout.group_size 4 --rollout.batch_size 8"
    config = parse(
        f"{settings} --update.batch_size 6 --rollout.guidance_scale 2 --update.kl_weight 0.1 --policy.lora_rank 4 "
        "--policy.decode_batch_size 5 --policy.vae_dtype bfloat16 --policy.text_encoder_dtype float16".split()
    )
    found = estimate(config, processes=2)
    work, flops = found.work, found.flops
    assert {phase: part.flops for phase, part in work.items() if phase != "encode"} == pytest.approx(
        {phase: flops[phase] * 3 / 5 for phase in ("rollout", "decode", "update", "reference")}
    )
    # 12 images in 2 batches of 10 steps and 2 branches, 36 pairs in 6 micro-batches; 3 prompts and the empty one
    assert {phase: part.passes for phase, part in work.items()} == {
        "encode": 4,
        "rollout": 40,
        "decode": 3,
        "update": 6,
        "reference": 6,
    }
    assert [work[phase].dtype for phase in ("encode", "rollout", "decode", "update")] == [
        "float16",
        "float32",
        "bfloat16",
        "float32",
    ]
    transformer = 4 * (found.frozen["transformer"] + found.trained)
    assert 0.99 * transformer < work["rollout"].weights <= transformer
    assert work["reference"].weights == work["rollout"].weights - 4 * found.trained
    assert 0 < work["decode"].weights < 2 * found.frozen["vae"]  # without its encoder
    encoders = found.frozen["text_encoder"] + found.frozen["text_encoder_2"]
    assert 0.3 * encoders < work["encode"].weights < 2 * encoders  # without the tables of tokens
    checkpointed = replace(config, policy=replace(config.policy, gradient_checkpointing=True, embeddings_dir="x"))
    again = estimate(checkpointed, processes=2).work
    assert again["update"].flops == pytest.approx((flops["update"] + flops["checkpointing"]) * 3 / 5)
    assert "encode" not in again


def test_dry_run_says_the_bound(capsys):
    assert train.main(["--dry_run", "--gpu", "4090"]) == 0
    text = capsys.readouterr().out
    assert text.count("least time of an epoch on 4090 (165.2 TFLOP/s, in float32 82.6, 1.008 TB/s): a bound,") == 1
    rows = re.findall(r"\n  ([a-z/]+)(?:, s)? +\S+ +\S+(?=\n)", text[text.index("least time") :])
    assert rows == ["encode", "rollout", "decode", "update", "all", "images/s"]
    assert train.main(["--dry_run", "--gpu", "v100"]) == 2
    assert f"gpu: expected one of {', '.join(CARDS)}, got v100" in capsys.readouterr().err
