"""GenEval's detector for real images: its definition written out with OpenCV, numpy, PIL and the plain networks."""

import functools
import math
from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from support.reward_models import clip_folder, mask2former_folder, sample_images, to_pil
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor, Mask2FormerForUniversalSegmentation

from fastflowgrpo.prompts import Prompt
from fastflowgrpo.prompts.geneval import CLASSES
from fastflowgrpo.rewards import RewardBatch, build_rewards
from fastflowgrpo.rewards.geneval import Detection, GenEval, check
from fastflowgrpo.rewards.mask2former import Mask2FormerDetector, _best

SIZE = (64, 128)
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("geneval")
    return {"model": mask2former_folder(folder / "mask2former"), "clip": clip_folder(folder / "clip")}


@pytest.fixture(scope="module")
def detector(folders) -> Mask2FormerDetector:
    return Mask2FormerDetector(**folders, size=SIZE)


def in_float64(detector: Mask2FormerDetector) -> Mask2FormerDetector:
    """The detector with its network in float64.

    A pixel belongs to an object, and is attended to by the next layer, where the logit of the mask is above 0. In
    float32 the last bits of that logit depend on the batch size and the number of threads. On the plain images this
    can move a pixel across the threshold, which changes a score in the second digit.
    """
    detector.network.double()
    detector.dtype = torch.float64
    return detector


def wants(tag: str, *colored: str) -> dict[str, Any]:
    others = [name for name in CLASSES if name not in colored]
    include = [{"class": name, "count": 1, "color": "red"} for name in colored]
    return {"tag": tag, "include": [*include, *({"class": name, "count": 1} for name in others[:2])]}


@functools.cache
def load(cls: Any, folder: str) -> Any:
    return cls.from_pretrained(folder)


def source_detections(folders: dict[str, str], image: Image.Image, metadata: dict[str, Any]) -> list[Detection]:
    """mmdetection's Mask2Former and GenEval's thresholds and colours, for one image."""
    width, height = image.size
    scale = min(SIZE[1] / max(height, width), SIZE[0] / min(height, width))
    new_width, new_height = int(width * scale + 0.5), int(height * scale + 0.5)
    pixels = cv2.resize(np.array(image).astype(np.float32), (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    mean, std = np.array([123.675, 116.28, 103.53], np.float32), np.array([58.395, 57.12, 57.375], np.float32)
    pixels = (pixels - mean) / std
    padded = np.zeros((math.ceil(new_height / 32) * 32, math.ceil(new_width / 32) * 32, 3))
    padded[:new_height, :new_width] = pixels
    network = load(Mask2FormerForUniversalSegmentation, folders["model"]).double()
    with torch.no_grad():
        output = network(pixel_values=torch.tensor(padded).permute(2, 0, 1)[None])
    masks = F.interpolate(output.masks_queries_logits, padded.shape[:2], mode="bilinear")
    masks = F.interpolate(masks[:, :, :new_height, :new_width], (height, width), mode="bilinear")[0].numpy()
    classes = np.exp(output.class_queries_logits[0].numpy())
    classes = classes[:, :-1] / classes.sum(1, keepdims=True)

    found = []
    for place in np.argsort(-classes, axis=None)[:100]:
        query, label = divmod(int(place), 80)
        inside = masks[query] > 0
        if inside.any():
            score = classes[query, label] * (1 / (1 + np.exp(-masks[query][inside]))).mean()
            rows, columns = np.nonzero(inside)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            if score > (0.9 if metadata["tag"] == "counting" else 0.3):
                found.append((CLASSES[label], box, score, inside))
    found.sort(key=lambda item: -item[2])
    found = [item for i, item in enumerate(found) if sum(other[0] == item[0] for other in found[:i]) < 16]
    colored = {include["class"] for include in metadata["include"] if "color" in include}
    return [
        Detection(
            label, box, score, source_color(folders["clip"], image, inside, box, label) if label in colored else None
        )
        for label, box, score, inside in found
    ]


def source_color(clip: str, image: Image.Image, inside: np.ndarray, box: tuple[int, ...], label: str) -> str:
    network, processor = load(CLIPModel, clip), load(CLIPProcessor, clip)
    crop = Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(inside)).crop(box)
    texts = [f"a photo of a {text}" for c in COLORS for text in (f"{c} {label}", f"{c}-colored {label}", f"{c} object")]
    inputs = processor(text=texts, images=[crop], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = network(**inputs)
    classifier = F.normalize(output.text_embeds.unflatten(0, (10, 3)).mean(1), dim=-1)
    return COLORS[int((output.image_embeds @ classifier.T).argmax())]


@pytest.mark.parametrize("size", [(64, 64), (40, 60), (100, 100), (30, 100)], ids=str)
def test_detections_are_those_of_the_source(folders, size):
    detector, images = in_float64(Mask2FormerDetector(**folders, size=SIZE)), sample_images(*size)
    # Ask for the colours of half of what is on the images, as the detector sees it.
    seen = sorted({d.label for found in detector(images, [wants("colors")] * 6) for d in found})
    metadata = [wants("colors", *seen[::2])] * 4 + [wants("counting", *seen[1::2])] * 2
    found = detector(images, metadata)
    colors = set()
    for image, data, detections in zip(to_pil(images), metadata, found, strict=True):
        expected = source_detections(folders, image, data)
        assert [(d.label, d.box, d.color) for d in detections] == [(d.label, d.box, d.color) for d in expected]
        assert [d.score for d in detections] == pytest.approx([d.score for d in expected], abs=5e-5)
        colors |= {d.color for d in detections}
    assert None in colors and len(colors) > 2
    assert all(len(detections) >= 2 for detections in found[:4])


def test_counting_wants_a_higher_score(detector):
    images = sample_images(64, 64)
    found = detector(images, [wants("two_object")] * 6)
    counted = detector(images, [wants("counting")] * 6)
    assert counted == [[d for d in detections if d.score > 0.9] for detections in found]
    assert 0 < sum(map(len, counted)) < sum(map(len, found))


def test_nothing_depends_on_the_batch(folders):
    detector, images = in_float64(Mask2FormerDetector(**folders, size=SIZE)), sample_images(64, 64)
    metadata = [wants("colors", *CLASSES[::2])] * 6
    whole = detector(images, metadata)
    parts = in_float64(Mask2FormerDetector(**folders, size=SIZE, batch_size=4))(images, metadata)
    for detections, again in zip(whole, parts, strict=True):
        assert [(d.label, d.box, d.color) for d in detections] == [(d.label, d.box, d.color) for d in again]
        assert [d.score for d in detections] == pytest.approx([d.score for d in again], abs=1e-5)
    assert detector(images[:0], []) == []


def test_best_of_each_class_with_their_boxes():
    masks = torch.zeros(20, 6, 8, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 5, 7] = True
    masks[2, 1:4, 2:3] = masks[2, 2, 5] = True
    masks[3:] = True
    scores = [0.5, 0.6, 0.7, 0.3, *(0.8 + i / 64 for i in range(6))]
    kept = _best(scores, [0, 1, 0, 2, *[3] * 5, 0], masks, threshold=0.3)
    by_score = {o.score: o for o in kept}
    assert [by_score[s].box for s in (0.5, 0.6, 0.7, 0.8)] == [(0, 0, 1, 1), (7, 5, 8, 6), (2, 1, 6, 4), (0, 0, 8, 6)]
    assert [o.score for o in kept] == sorted(by_score, reverse=True) and 0.3 not in by_score
    assert [o.label for o in kept[:2]] == ["person", "motorcycle"]
    seventeen = _best([0.9 - i / 1000 for i in range(17)], [5] * 17, masks[3:], threshold=0.3)
    assert [o.score for o in seventeen] == [0.9 - i / 1000 for i in range(16)]


def test_the_classes_are_genevals():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    coco = {0: "person", 2: "car", 16: "dog", 41: "cup", 57: "couch", 64: "computer mouse", 65: "tv remote"}
    coco |= {66: "computer keyboard", 72: "refrigerator", 79: "toothbrush"}
    assert {i: CLASSES[i] for i in coco} == coco


def test_as_a_reward(folders, detector):
    images = sample_images(64, 64)
    (label, count), *_ = Counter(d.label for d in detector(images[:1], [wants("colors")])[0]).items()
    metadata = [{"tag": "single_object", "include": [{"class": label, "count": count}]}] * 5 + [wants("counting")]
    rewards = build_rewards({"geneval": {"detector": "mask2former", "strict": 0.5, "size": [64, 128], **folders}})
    scores = rewards(RewardBatch(images, ["p"] * 6, metadata, torch.arange(6)))
    results = [check(data, found) for data, found in zip(metadata, detector(images, metadata), strict=True)]
    assert scores.values.tolist() == pytest.approx([(r.score + r.strict) / 2 for r in results])
    assert scores.details["geneval/correct"].tolist() == [r.correct for r in results]
    assert scores.values[0] == 1 and scores.values.min() < 1
    reward = rewards.rewards["geneval"]
    assert reward.pointwise and reward.device == next(reward.detector.network.parameters()).device


def test_prompts_beyond_the_detector(detector):
    reward = GenEval(detector)
    reward.check_prompts([Prompt("a photo of a tv remote", wants("colors", "tv remote"))])
    with pytest.raises(ValueError, match=r"^prompt 'a': the detector knows person, .*, toothbrush, not 'remote'$"):
        reward.check_prompts([Prompt("a", {"tag": "counting", "include": [{"class": "remote", "count": 1}]})])
    gray = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "gray"}]}
    with pytest.raises(ValueError, match=r"^prompt 'a': the detector knows red, orange, .*, white, not 'gray'$"):
        reward.check_prompts([Prompt("a", gray)])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"size": [64]}, r"size must be the shorter and the longer side, at least 32, got \[64\]"),
        ({"size": [64, 32]}, "size must be the shorter and the longer side"),
        (
            {"modle": "x"},
            r"unknown setting 'modle' \(did you mean 'model'\?\), known: weight, detector, strict, model, c",
        ),
        ({"model": "no/model"}, "cannot load 'no/model': .*give a local folder"),
        ({"clip": "no/clip"}, "cannot load 'no/clip': .*give a local folder"),
        ({"dtype": "int8"}, "unknown dtype 'int8', known: float32"),
    ],
)
def test_settings_errors(folders, settings, message):
    with pytest.raises(ValueError, match=rf"^rewards\.geneval: {message}") as error:
        build_rewards({"geneval": {"detector": "mask2former", **folders, **settings}})
    assert "\n" not in str(error.value)


def test_other_detectors_do_not_take_its_settings(folders):
    message = r"unknown setting 'clip', known: weight, detector, strict$"
    for detector in ("shapes", lambda images, metadata: []):
        with pytest.raises(ValueError, match=message):
            GenEval(detector, clip=folders["clip"])


def test_a_network_of_other_classes_is_refused(folders, tmp_path):
    model = mask2former_folder(tmp_path, classes=5)
    with pytest.raises(ValueError, match=r"has 5 classes, not the 80 of COCO instances$"):
        Mask2FormerDetector(model, folders["clip"])
