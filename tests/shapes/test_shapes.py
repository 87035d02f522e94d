"""The bundled world: prompts, scenes, detector, and the pipeline's own quality."""

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from fastflowgrpo.prompts import TAGS, check_metadata
from fastflowgrpo.prompts.geneval import meaning
from fastflowgrpo.rewards.geneval import check
from fastflowgrpo.rewards.shapes_detector import detect_shapes
from fastflowgrpo.shapes import PIPELINE, scenes
from fastflowgrpo.shapes.pretrain import crowded_scenes
from fastflowgrpo.shapes.scenes import (
    CELL,
    Shape,
    caption_prompts,
    eval_prompts,
    render,
    sample_scene,
    train_prompts,
)
from fastflowgrpo.shapes.tokenizer import MAX_LENGTH, build_tokenizer


def to_batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def found(images: torch.Tensor) -> list[list[tuple[str, str | None, int, int]]]:
    """What the detector sees: (shape, colour, column, row) of each object, sorted."""
    return [
        sorted(
            (d.label, d.color, int(d.box[0] + d.box[2]) // (2 * CELL), int(d.box[1] + d.box[3]) // (2 * CELL))
            for d in detections
        )
        for detections in detect_shapes(images)
    ]


def truth(drawn: list[list[Shape]]) -> list[list[tuple[str, str, int, int]]]:
    return [sorted((s.shape, s.color, s.column, s.row) for s in scene) for scene in drawn]


def right(images: torch.Tensor, drawn: list[list[Shape]]) -> float:
    return float(np.mean([a == b for a, b in zip(found(images), truth(drawn), strict=True)]))


def prompted_scenes(count: int) -> list[list[Shape]]:
    rng = np.random.default_rng(5)
    prompts = [p for tag in caption_prompts().values() for p in tag]
    return [sample_scene(prompts[rng.integers(len(prompts))].metadata, rng) for _ in range(count)]


def test_training_and_held_out_prompts_are_disjoint():
    held_out = eval_prompts()
    texts = {prompt.text for prompt in held_out}
    assert texts.isdisjoint(prompt.text for prompt in train_prompts())
    assert texts.isdisjoint(prompt.text for prompts in caption_prompts().values() for prompt in prompts)
    meanings = {meaning(prompt.metadata) for prompt in train_prompts()}
    assert meanings.isdisjoint(meaning(prompt.metadata) for prompt in held_out)
    assert {tag: sum(p.metadata["tag"] == tag for p in held_out) for tag in TAGS} == dict.fromkeys(TAGS, 36)


@pytest.mark.parametrize("tag", ["counting", "colors", "position", "color_attr"])
def test_held_out_and_training_contents_are_spread_over_all_shapes_numbers_colours_and_relations(tag):
    """A shape that training shows with one number only would be learned with that number."""

    def words(prompts):
        of_tag = [p.text.split()[3:] for p in prompts if p.metadata["tag"] == tag]
        return Counter(word for text in of_tag for word in text if len(word) > 2 and word != "and")

    held_out, trained = words(eval_prompts()), words(train_prompts())
    assert set(held_out) <= set(trained)
    assert len(set(trained) - set(held_out)) <= 1
    for is_shape in (True, False):  # the rest are numbers, colours or relations
        counts = [n for word, n in trained.items() if word.startswith(scenes.SHAPES) == is_shape]
        assert max(counts) <= 2 * min(counts)


def test_prompts_that_ask_for_the_same_have_one_meaning():
    by_text = {prompt.text: meaning(prompt.metadata) for tag in caption_prompts().values() for prompt in tag}
    start = "a drawing of a "
    assert by_text[start + "circle left of a cross"] == by_text[start + "cross right of a circle"]
    assert by_text[start + "circle above a cross"] == by_text[start + "cross below a circle"]
    assert by_text[start + "circle above a cross"] != by_text[start + "cross above a circle"]
    assert by_text[start + "circle and a cross"] == by_text[start + "cross and a circle"]
    assert by_text[start + "red circle and a blue cross"] == by_text[start + "blue cross and a red circle"]
    assert by_text[start + "red circle and a blue cross"] != by_text[start + "blue circle and a red cross"]
    # 4 shapes, 4 colours: 6 pairs, 12 counts, 16 colours, 24 positions, 72 pairs with colours
    assert len(set(by_text.values())) == 4 + 6 + 12 + 16 + 24 + 72


def test_every_prompt_has_valid_metadata_and_a_scene_that_fulfils_it():
    rng = np.random.default_rng(0)
    prompts = [*train_prompts(), *eval_prompts()]
    for prompt in prompts:
        check_metadata(prompt.metadata)
    images = to_batch(render([sample_scene(prompt.metadata, rng) for prompt in prompts]))
    results = [check(p.metadata, d) for p, d in zip(prompts, detect_shapes(images), strict=True)]
    assert all(result.strict and result.correct and result.score == 1 for result in results)


@pytest.mark.parametrize("drawn", [prompted_scenes(1000), crowded_scenes(1000, 3)], ids=["prompted", "crowded"])
def test_the_detector_is_right_on_rendered_truth(drawn):
    assert right(to_batch(render(drawn)), drawn) >= 0.99


def test_the_detector_ignores_what_is_no_shape():
    empty = render([[]])
    specks = empty.copy()
    specks[0, 10:13, 10:13] = scenes.COLORS["red"]
    gray = empty.copy()
    gray[0, 8:24, 8:24] = (128, 128, 128)
    assert [len(d) for d in detect_shapes(to_batch(np.concatenate([empty, specks, gray])))] == [0, 0, 0]


def test_two_touching_shapes_of_one_colour_are_one_object_and_of_two_colours_two():
    image = render([[]])
    image[0, 8:18, 4:14] = scenes.COLORS["red"]
    image[0, 8:18, 14:24] = scenes.COLORS["blue"]
    assert [(d.label, d.color) for d in detect_shapes(to_batch(image))[0]] == [("square", "red"), ("square", "blue")]
    image[0, 8:18, 14:24] = scenes.COLORS["red"]
    assert len(detect_shapes(to_batch(image))[0]) == 1


def test_the_tokenizer_is_the_same_each_time_and_gives_a_token_per_word():
    captions = [prompt.text for prompts in caption_prompts().values() for prompt in prompts]
    first, second = build_tokenizer(captions), build_tokenizer(captions[::-1])
    assert first.get_vocab() == second.get_vocab()
    text = "a photo of a red circle and a blue square"
    assert first(text).input_ids == second(text).input_ids
    assert len(first(text).input_ids) == len(text.split()) + 2 <= MAX_LENGTH
    assert first.decode(first("a zebra").input_ids, skip_special_tokens=True).strip() == "a zebra"


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_detector_is_right_through_the_vae(pipeline):
    drawn = prompted_scenes(1000)
    pixels = to_batch(render(drawn)).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0))
        decoded = pipeline.vae.decode(latents).sample
    assert right((decoded * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8), drawn) >= 0.97
    scaled = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.1
    assert abs(scaled.std() - 1) < 0.1


def test_the_pipeline_draws_with_and_without_the_zero_tokens_of_a_missing_t5(pipeline):
    prompts = [prompt for prompt in eval_prompts() if prompt.metadata["tag"] == "single_object"]
    for length in (0, 256):
        images = pipeline(
            [prompt.text for prompt in prompts],
            guidance_scale=1,
            num_inference_steps=20,
            max_sequence_length=length,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        batch = to_batch((images * 255).round().astype(np.uint8))
        strict = [check(p.metadata, d).strict for p, d in zip(prompts, detect_shapes(batch), strict=True)]
        assert np.mean(strict) > 0.8
