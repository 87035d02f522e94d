"""Editing tasks of the bundled world: instructions, their exact check, and the base model's quality."""

import numpy as np
import pytest
import torch

from fastflowgrpo.config import BUNDLED_MODELS, PolicyConfig, parse
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy import load_policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.prompts.images import read_image
from fastflowgrpo.rewards import RewardBatch
from fastflowgrpo.rewards.shapes_edit import ShapesEdit, check_edit
from fastflowgrpo.sampling.ode import sample_ode
from fastflowgrpo.shapes import BUNDLED
from fastflowgrpo.shapes.edits import (
    CONTENTS,
    HELD_OUT,
    WORDINGS,
    Edit,
    eval_prompts,
    pretraining_edits,
    sample_source,
    train_prompts,
    wrong_edit,
)
from fastflowgrpo.shapes.scenes import render

SOURCE = {(0, 0): [("circle", "red")], (2, 1): [("cross", "blue")]}


def scored(edits, before, after):
    images, sources = (torch.from_numpy(render(scenes)).permute(0, 3, 1, 2) for scenes in (after, before))
    metadata = [{"tag": edit.action, "class": edit.shape, "color": edit.color} for edit in edits]
    return ShapesEdit()(RewardBatch(images, ["p"] * len(edits), metadata, torch.arange(len(edits)), list(sources)))


def test_the_reward_is_1_for_the_edit_and_0_for_another_one_or_none():
    rng = np.random.default_rng(0)
    edits = [Edit(action, *content) for action in WORDINGS for content in CONTENTS]
    before = [sample_source(edit, rng) for edit in edits]
    done = scored(edits, before, [edit(scene, rng) for edit, scene in zip(edits, before, strict=True)])
    assert (done.values == 1).all() and (done.details["strict"] == 1).all()
    pairs = zip(edits, before, strict=True)
    wrong = scored(edits, before, [wrong_edit(edit, scene, rng)(scene, rng) for edit, scene in pairs])
    assert (wrong.values == 0).all() and wrong.details["kept"].mean() < 1
    assert (scored(edits, before, before).values == 0).all()


@pytest.mark.parametrize(
    "tag, changes, done, kept",
    [
        ("recolor", {(0, 0): [("circle", "green")]}, 1, 1),
        ("recolor", {(0, 0): [("circle", "green")], (2, 1): [("cross", "green")]}, 1, 0),
        ("recolor", {(0, 0): [("square", "green")]}, 0, 1),
        ("recolor", {(0, 0): None, (1, 1): [("circle", "green")]}, 0, 1 / 2),
        ("remove", {(0, 0): None}, 0, 1 / 2),
        ("add", {(1, 1): [("circle", "green")]}, 1, 1),
        ("add", {(1, 1): [("circle", "green")], (0, 2): [("circle", "green")]}, 1, 2 / 3),
        ("add", {(0, 0): [("circle", "green")]}, 0, 1 / 2),
        ("add", {(1, 1): [("circle", "green"), ("cross", "red")]}, 0, 2 / 3),
    ],
)
def test_what_must_not_change_is_scored(tag, changes, done, kept):
    result = {cell: objects for cell, objects in (SOURCE | changes).items() if objects}
    found = check_edit({"tag": tag, "class": "circle", "color": "green"}, SOURCE, result)
    assert found == (done, pytest.approx(kept))


def test_prompts_without_an_edit_are_refused():
    with pytest.raises(ValueError, match=r"prompt 'a cat': tag is None, expected one of recolor, add, remove"):
        ShapesEdit().check_prompts([Prompt("a cat")])
    batch = RewardBatch(torch.zeros(1, 3, 48, 48, dtype=torch.uint8), ["p"], [{}], torch.zeros(1))
    with pytest.raises(UserError, match="no source images"):
        ShapesEdit()(batch)


def test_training_never_has_a_held_out_edit_or_an_evaluated_sentence():
    train, held_out = train_prompts(), eval_prompts()
    assert {(p.metadata["class"], p.metadata["color"]) for p in held_out} == set(HELD_OUT)
    assert not {(p.metadata["class"], p.metadata["color"]) for p in train} & set(HELD_OUT)
    assert {p.image for p in train}.isdisjoint(p.image for p in held_out)
    texts = {text for text, _, _ in pretraining_edits(3000, 0.3, seed=0)}
    assert texts.isdisjoint(p.text for p in held_out) and {p.text for p in train} <= texts
    ShapesEdit().check_prompts([*train, *held_out])


def test_the_bundled_model_makes_about_half_of_the_edits_and_keeps_most_of_the_rest():
    policy, prompts = load_policy("shapes_edit", PolicyConfig()), eval_prompts(per_action=24)
    shape = policy.latent_shape(None, None)
    noise = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(0))
    images = policy.decode(sample_ode(policy, EmbeddingCache(policy, shape=shape)(prompts), 8, noise))
    sources = [read_image(prompt.image, 48, 48) for prompt in prompts]
    metadata = [prompt.metadata for prompt in prompts]
    scores = ShapesEdit()(RewardBatch(images, ["p"] * len(prompts), metadata, torch.arange(len(prompts)), sources))
    assert 0.4 < scores.details["done"].mean() < 0.8 and scores.details["kept"].mean() > 0.7


def test_the_bundled_pipelines_do_not_say_where_they_were_made():
    for folder in BUNDLED.values():
        for path in folder.rglob("*.json"):
            assert "_name_or_path" not in path.read_text(), path


def test_the_settings_know_the_bundled_models():
    assert tuple(BUNDLED) == BUNDLED_MODELS
    for name in BUNDLED_MODELS:
        with pytest.raises(UserError, match=r"policy\.quantization: full training quantises its reference"):
            parse(["--model", name, "--policy.quantization", "nf4"])
