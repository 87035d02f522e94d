"""Prompts with source images: files, folders of pairs, their errors, and reading."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt, load_prompts
from fastflowgrpo.prompts.images import read_image
from fastflowgrpo.runs.resume import prompts_digest

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "in/cat.png")
    return tmp_path


def lines(folder, *records):
    path = folder / "edits.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_a_line_names_its_image_relative_to_the_file(folder):
    (prompt,) = load_prompts(lines(folder, {"prompt": "make it red", "image": "in/cat.png", "mask": "left"}))
    assert (prompt.text, prompt.image, prompt.metadata["mask"]) == ("make it red", folder / "in/cat.png", "left")


def test_a_line_may_name_several_images(folder):
    Image.fromarray(PIXELS).save(folder / "in/dog.png")
    one, two = load_prompts(
        lines(
            folder,
            {"prompt": "x", "image": ["in/cat.png"]},
            {"prompt": "x", "image": ["in/dog.png", "in/cat.png"]},
        )
    )
    assert one.images == (one.image,) == (folder / "in/cat.png",)
    assert two.images == (two.image, *two.references) == (folder / "in/dog.png", folder / "in/cat.png")
    assert len({prompts_digest([prompt]) for prompt in (one, two, Prompt("x", {}, two.image))}) == 3


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "x", "image": ["in/cat.png", "in/cot.png"]}, r"image\[1\]: no such file .*did you mean 'cat\.png'"),
        ({"prompt": "x", "image": ["in/cat.png", 3]}, r"image\[1\]: expected the path of an image, got 3"),
        ({"prompt": "x", "image": []}, r"image: expected the path of an image, or a list of paths, got \[\]"),
        ({"prompt": "x", "image": "in/cot.png"}, r"image: no such file .*in/cot\.png \(did you mean 'cat\.png'\?\)"),
        ({"prompt": "x", "image": "edits.jsonl"}, r"image: .*edits\.jsonl is not an image"),
        ({"prompt": "x", "image": 3}, r"image: expected the path of an image, or a list of paths, got 3"),
        ({"image": "in/cat.png"}, r"prompt: missing, expected the prompt's text"),
    ],
)
def test_errors_name_line_and_key(folder, record, message):
    path = lines(folder, {"prompt": "make it red", "image": "in/cat.png"}, record)
    with pytest.raises(ValueError, match=r"edits\.jsonl, line 2: " + message):
        load_prompts(path)


def test_a_folder_of_pairs(folder):
    pairs = folder / "in"
    (pairs / "cat.txt").write_text(" make it red\n")
    Image.fromarray(PIXELS).save(pairs / "dog.JPG", "jpeg")
    with pytest.raises(ValueError, match=r"dog\.JPG: there is no dog\.txt beside it"):
        load_prompts(str(pairs))
    (pairs / "dog.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"dog\.txt: there is no prompt in it"):
        load_prompts(str(pairs))
    (pairs / "dog.txt").write_text("remove it")
    found = load_prompts(str(pairs))
    assert [(p.text, p.image) for p in found] == [("make it red", pairs / "cat.png"), ("remove it", pairs / "dog.JPG")]
    (pairs / "bird.txt").write_text("x")
    with pytest.raises(ValueError, match=r"bird\.txt: there is no bird\.png beside it"):
        load_prompts(str(pairs))
    with pytest.raises(ValueError, match=r"there is no pair NAME\.png and NAME\.txt in it"):
        load_prompts(str(folder))


def test_an_image_is_scaled_and_cut_around_its_centre(folder):
    path = folder / "in/cat.png"
    assert torch.equal(read_image(path, 4, 6), torch.from_numpy(PIXELS).permute(2, 0, 1))
    assert torch.equal(read_image(path.read_bytes(), 4, 4), torch.from_numpy(PIXELS[:, 1:5]).permute(2, 0, 1))
    assert read_image(path, 8, 12).shape == (3, 8, 12)
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "png")
    (folder / "broken.png").write_bytes(file.getvalue()[:2000])
    with pytest.raises(UserError, match=r"source image .*broken\.png: cannot be read"):
        read_image(folder / "broken.png", 8, 8)


def test_a_resumed_run_tells_images_by_their_names():
    def digest(image):
        return prompts_digest([Prompt("x", image=image)])

    assert digest(Path("a/cat.png")) == digest(Path("b/cat.png")) != digest(Path("a/dog.png"))
    assert len({digest(None), digest(b"cat"), digest(b"dog")}) == 3
