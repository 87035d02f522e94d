"""The gallery of a run: what is kept of an evaluation and of a rollout, how much, and after a resume."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastflowgrpo.config import Config, EvaluationConfig
from fastflowgrpo.evaluation.shown import GalleryImages, gather_gallery
from fastflowgrpo.prompts import TAGS, Prompt
from fastflowgrpo.rewards import Scores, WeightedRewards
from fastflowgrpo.rewards.geneval import Detection
from fastflowgrpo.runs import gallery as module
from fastflowgrpo.runs.gallery import Gallery, cut_back
from fastflowgrpo.sampling.rollout import sample_seeds

PROMPTS = [Prompt("a cat"), Prompt("two dogs", {"tag": "counting"})]


class Reward:
    """Sees a cat in the left half of every image."""

    def __call__(self, batch):
        return torch.ones(len(batch.prompts))

    def detect(self, batch):
        width, height = batch.images.shape[-1], batch.images.shape[-2]
        return [[Detection("cat", (0.0, 0.0, width / 2, height), 0.75, "red")] for _ in batch.prompts]


def gallery_of(folder, trackers=(), rewards=None, epochs=10, prompts=PROMPTS, **evaluation):
    config = Config(output_dir=str(folder), epochs=epochs, evaluation=EvaluationConfig(**evaluation))
    rewards = WeightedRewards(rewards or {"mine": Reward()}, {"mine": 1.0})
    return Gallery(config, prompts, rewards, SimpleNamespace(trackers=list(trackers)))


def evaluation_of(size=(24, 16), images_per_prompt=2):
    """Two prompts; the images of a prompt are red by 10 * prompt + number."""
    height, width = size
    images = torch.zeros(2, images_per_prompt, 3, height, width, dtype=torch.uint8)
    images[:, :, 0] = (10 * torch.arange(2)[:, None] + torch.arange(images_per_prompt))[:, :, None, None]
    scores = {
        "reward": torch.tensor([[0.25, 1 / 3], [torch.nan, 1.0]]),
        "geneval/strict": torch.tensor([[0.0, 1.0], [torch.nan, 1.0]]),
    }
    return SimpleNamespace(gallery=GalleryImages([0, 1], images), measures={"Scores": scores})


def index_of(folder):
    return [json.loads(line) for line in (folder / "gallery/index.jsonl").read_text().splitlines()]


def test_an_evaluation_is_kept_with_all_about_its_images(tmp_path):
    gallery_of(tmp_path).evaluation(evaluation_of(), epoch=0, step=12)
    (line,) = index_of(tmp_path)
    assert (line["folder"], line["kind"], line["step"], line["epoch"]) == ("step-000012", "evaluation", 12, 0)
    assert [image["file"] for image in line["images"]] == ["0-0.webp", "0-1.webp", "1-0.webp", "1-1.webp"]
    second, missing = line["images"][1:3]
    assert second["text"] == "a cat" and second["tag"] is None and second["correct"] is True
    assert second["scores"] == {"reward": 0.333333, "geneval/strict": 1.0}
    assert int(second["seed"]) == sample_seeds([0], 2)[1]  # the seed of the noise in every evaluation
    assert second["detections"] == [{"by": "mine", "label": "red cat", "score": 0.75, "box": [0.0, 0.0, 0.5, 1.0]}]
    assert missing["correct"] is None and missing["scores"]["reward"] is None and missing["tag"] == "counting"
    with Image.open(tmp_path / "gallery/step-000012/1-1.webp") as image:
        assert image.size == (16, 24) and image.convert("RGB").getpixel((0, 0)) == (11, 0, 0)
    assert {path.name for path in (tmp_path / "gallery").iterdir()} == {"index.jsonl", "step-000012"}


def test_a_group_is_kept_in_the_order_of_its_advantages(tmp_path):
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    advantages = torch.tensor([0.0, 2.0, torch.nan, -1.0, 1.0, 2.0, 3.0, 4.0])
    scores = Scores(torch.arange(8.0), {"mine": torch.arange(8.0) / 10})
    gallery_of(tmp_path).rollout(3, 6, PROMPTS, [7, 2**40], images, scores, advantages, [0, 1])
    (line,) = index_of(tmp_path)
    first, second = line["groups"]
    assert first["advantages"] == [2.0, 0.0, -1.0, None] and first["scores"]["reward"] == [1.0, 0.0, 3.0, 2.0]
    assert second["scores"]["mine"] == pytest.approx([0.7, 0.6, 0.5, 0.4]) and second["seed"] == str(2**40)
    with Image.open(tmp_path / "gallery/epoch-000003/0.webp") as sheet:
        corners = [sheet.convert("RGB").getpixel(place)[0] for place in ((0, 0), (8, 0), (0, 8), (8, 8))]
    assert corners == [1, 0, 3, 2] and first["columns"] == 2
    gallery_of(tmp_path).rollout(4, 8, PROMPTS[1:], [2**40], images[4:], scores, advantages, [1])
    assert index_of(tmp_path)[1]["groups"] == [{**second, "file": "0.webp"}]


def test_the_sources_of_edits_are_kept_whatever_their_files_are_called(tmp_path):
    path = tmp_path / '"><script>alert(1)</script>..png'.replace("/", "∕")
    Image.new("RGB", (64, 96), (0, 200, 0)).save(path)
    prompts = [Prompt("make it blue", image=path), Prompt("add a hat", image=path.read_bytes())]
    gallery = gallery_of(tmp_path, prompts=prompts)
    gallery.evaluation(evaluation_of(), 0, 12)
    advantages = torch.tensor([0.0, 1.0])
    images = torch.zeros(2, 3, 24, 16, dtype=torch.uint8)
    gallery.rollout(0, 12, prompts[:1], [1], images, Scores(torch.zeros(2)), advantages, [0])
    evaluated, sampled = index_of(tmp_path)
    assert [image["source"] for image in evaluated["images"]] == 2 * ["0-source.webp"] + 2 * ["1-source.webp"]
    assert sampled["groups"][0]["source"] == "0-source.webp"
    for file in ("step-000012/0-source.webp", "step-000012/1-source.webp", "epoch-000000/0-source.webp"):
        with Image.open(tmp_path / "gallery" / file) as image:
            assert image.size == (16, 24) and image.convert("RGB").getpixel((8, 12)) == (0, 200, 0)


def test_large_images_are_shrunk(tmp_path):
    gallery_of(tmp_path).evaluation(evaluation_of(size=(600, 1200)), 0, 0)
    with Image.open(tmp_path / "gallery/step-000000/0-0.webp") as image:
        assert image.size == (512, 256)
    images = torch.zeros(2, 3, 600, 300, dtype=torch.uint8)
    gallery_of(tmp_path).rollout(0, 0, PROMPTS[:1], [1], images, Scores(torch.zeros(2)), torch.zeros(2), [0])
    with Image.open(tmp_path / "gallery/epoch-000000/0.webp") as sheet:
        assert sheet.size == (2 * 96, 192)


def test_of_a_long_run_a_limited_number_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_EVALUATIONS", 4)
    gallery = gallery_of(tmp_path, epochs=1010, every=10)
    assert sum(map(gallery.keeps_epoch, range(1010))) == 92 and gallery.keeps_epoch(0)
    for epoch in (*range(0, 1010, 10), 1010):
        gallery.evaluation(evaluation_of(), epoch, 2 * epoch)
    assert [line["epoch"] for line in index_of(tmp_path)] == [0, 260, 520, 780, 1010]
    assert all(map(gallery_of(tmp_path, epochs=100).keeps_epoch, range(100)))
    assert not gallery_of(tmp_path, gallery=0).keeps_epoch(0)


def test_a_reward_that_cannot_see_costs_its_boxes_only(tmp_path, capsys):
    class Blind(Reward):
        def detect(self, batch):
            raise RuntimeError("no eyes")

    gallery_of(tmp_path, rewards={"mine": Blind()}).evaluation(evaluation_of(), 0, 0)
    assert all(image["detections"] == [] for image in index_of(tmp_path)[0]["images"])
    assert "reward mine: nothing is drawn over the gallery's images: RuntimeError: no eyes" in capsys.readouterr().out


def test_a_resumed_run_has_the_gallery_of_its_rows(tmp_path):
    gallery, images = gallery_of(tmp_path), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for epoch in range(3):
        gallery.evaluation(evaluation_of(), epoch, 2 * epoch)
        gallery.rollout(epoch, 2 * epoch, PROMPTS[:1], [1], images, Scores(torch.zeros(2)), torch.zeros(2), [0])
    gallery.rollout(
        2, 4, PROMPTS[:1], [1], images, Scores(torch.ones(2)), torch.zeros(2), [0]
    )  # again: the last one holds
    (tmp_path / "gallery/.epoch-000003.tmp").mkdir()  # of a process that was killed
    with (tmp_path / "gallery/index.jsonl").open("a") as index:
        index.write('{"folder": "epoch-0000')
    cut_back(
        tmp_path, [{"step": 0, "eval": {}}, {"step": 2, "epoch": 0}, {"step": 2, "eval": {}}, {"step": 6, "epoch": 2}]
    )
    kept = ["step-000000", "epoch-000000", "step-000002", "epoch-000002"]
    assert [line["folder"] for line in index_of(tmp_path)] == kept
    assert index_of(tmp_path)[-1]["groups"][0]["scores"]["reward"] == [1.0, 1.0]
    assert {path.name for path in (tmp_path / "gallery").iterdir()} == {*kept, "index.jsonl"}
    cut_back(tmp_path / "run without a gallery", [])


def test_the_trackers_get_images_with_captions(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda image, caption: (image.size, caption)))
    added, logged = [], []
    board = SimpleNamespace(add_image=lambda tag, pixels, **options: added.append((tag, pixels.shape, options)))
    trackers = [
        SimpleNamespace(name="tensorboard", writer=board),
        SimpleNamespace(name="wandb", log=lambda values, step: logged.append((values, step))),
        SimpleNamespace(name="another"),
    ]
    gallery_of(tmp_path, trackers).evaluation(evaluation_of(), 0, 12)
    captions = ["a cat: reward 0.250, wrong", "two dogs: no reward"]  # the first image of each prompt
    assert logged == [({"gallery": [((16, 24), caption) for caption in captions]}, 12)]
    assert [tag for tag, _, _ in added] == ["gallery/0", "gallery/2"]
    assert all(shape[0] > 96 * 24 / 16 and options["global_step"] == 12 for _, shape, options in added)


def test_the_images_are_spread_over_the_tags_and_come_from_their_ranks():
    prompts = [Prompt(f"{tag} {i}", {"tag": tag}) for tag in TAGS for i in range(10)]
    images = torch.arange(360).view(360, 1, 1, 1)
    samples = SimpleNamespace(images=images, images_per_prompt=6)
    processes = SimpleNamespace(rank_indices=lambda total: list(range(total)), gather=lambda value: [value])
    shown = gather_gallery(prompts, samples, 48, processes)
    assert shown.images.shape[:2] == (24, 2) and len(shown.indices) == 24
    assert [prompts[i].metadata["tag"] for i in shown.indices] == [tag for tag in TAGS for _ in range(4)]
    assert shown.images.flatten().tolist() == [6 * i + k for i in shown.indices for k in range(2)]
    assert gather_gallery(prompts[:2], samples, 48, processes).images.shape[:2] == (2, 6)
    assert gather_gallery(prompts, samples, 1, processes).images.shape[:2] == (1, 1)
    assert gather_gallery(prompts, samples, 0, processes) is None
