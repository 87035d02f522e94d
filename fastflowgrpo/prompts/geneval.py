"""GenEval prompts (arXiv 2310.11513) over the 80 classes of COCO, from templates of our own."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastflowgrpo.prompts.prompt import RELATIONS, TAGS, Prompt

# The paper's mix of tags in training (arXiv 2505.05470); single_object is left to the evaluation.
MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
# GenEval's evaluation set: prompts of each tag.
EVALUATION = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
COUNT = 50_000  # the paper's number of training prompts

# COCO's 80 classes in COCO's order, by GenEval's names for them.
# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four"}

# Words that are not counted by themselves: "two pairs of scissors".
UNITS = {"scissors": ("pair", "pairs"), "skis": ("pair", "pairs"), "broccoli": ("head", "heads")}
IRREGULAR = {"person": "people", "knife": "knives", "computer mouse": "computer mice", "sheep": "sheep"}

_SHOTS = (
    "a photo of",
    "a photograph of",
    "a picture of",
    "an image of",
    "a snapshot of",
    "a close-up photo of",
    "a sharp photo of",
    "a realistic photo of",
    "a detailed photo of",
    "a high-quality photo of",
    "an amateur photo of",
    "a professional photo of",
    "a wide shot of",
    "a color photo of",
)
_SETTINGS = (
    "",
    " indoors",
    " outdoors",
    " in daylight",
    " at dusk",
    " in soft light",
    " in bright light",
    " on a cloudy day",
    " on a plain background",
    " with a blurred background",
)
# The first is GenEval's own, which evaluation prompts are in.
WORDINGS = tuple(f"{shot} {{}}{setting}" for setting in _SETTINGS for shot in _SHOTS)

# What a tag's prompts vary in: the number of choices of each.
_AXES = {
    "single_object": (len(CLASSES),),
    "two_object": (len(CLASSES), len(CLASSES)),
    "counting": (len(CLASSES), len(NUMBERS)),
    "colors": (len(CLASSES), len(COLORS)),
    "position": (len(CLASSES), len(CLASSES), len(RELATIONS)),
    "color_attr": (len(CLASSES), len(CLASSES), len(COLORS), len(COLORS)),
}

Content = tuple[str, dict[str, Any]]
"""What a prompt asks for: in words, and as GenEval metadata without its prompt."""


def generate(count: int = COUNT, seed: int = 0, exclude: Sequence[Prompt] = ()) -> list[Prompt]:
    """Training prompts in the mix of tags `MIX`, shuffled, no two the same.

    Every content of a tag comes in GenEval's wording, "a photo of ...", before one comes in another.

    Args:
        count: number of prompts.
        seed: of the choice and the order.
        exclude: prompts to stay away from: none of these texts is in the result, nor, where they have GenEval metadata,
            another wording or order of what they ask for (`meaning`).

    Raises:
        ValueError: there are not so many prompts.
    """
    rng = np.random.default_rng(seed)
    texts = {prompt.text.casefold() for prompt in exclude}
    meanings = {meaning(prompt.metadata) for prompt in exclude if "include" in prompt.metadata}
    prompts: list[Prompt] = []
    for tag, number in zip(MIX, _shares(count, list(MIX.values())), strict=True):
        allowed = (content for content in _contents(tag, rng) if meaning(content[1]) not in meanings)
        contents = list(itertools.islice(allowed, number))
        worded = (_prompt(wording, content) for wording in WORDINGS for content in contents)
        found = list(itertools.islice((prompt for prompt in worded if prompt.text.casefold() not in texts), number))
        if len(found) < number:
            raise ValueError(f"{number} {tag} prompts were asked for, but only {len(found)} are not excluded")
        prompts += found
    return [prompts[i] for i in rng.permutation(len(prompts))]


def evaluation(seed: int = 0) -> list[Prompt]:
    """Evaluation prompts, as many of each tag as GenEval's own 553, in its wording; no two ask for the same."""
    rng = np.random.default_rng(seed)
    prompts = []
    for tag in TAGS:
        distinct: dict[tuple[Any, ...], Content] = {}
        for content in _contents(tag, rng):
            distinct.setdefault(meaning(content[1]), content)
            if len(distinct) == EVALUATION[tag]:
                break
        prompts += [_prompt(WORDINGS[0], content) for content in distinct.values()]
    return prompts


def meaning(metadata: dict[str, Any]) -> tuple[Any, ...]:
    """What GenEval metadata asks for, whichever way round the prompt says it: the same for "a cat left of a dog" and
    "a dog right of a cat"."""
    objects = [(item["class"], item["count"], item.get("color", "")) for item in metadata["include"]]
    relations = []
    for item, subject in zip(metadata["include"], objects, strict=True):
        if "position" in item:
            relation, other = item["position"][0], objects[item["position"][1]]
            opposite = {"right of": "left of", "below": "above"}.get(relation)
            relations.append((other, opposite, subject) if opposite else (subject, relation, other))
    return tuple(sorted(objects)), tuple(sorted(relations))


def one(label: str, color: str = "") -> str:
    """One object of a class with its article: "an orange bus", "a pair of red scissors"."""
    noun = f"{color} {_noun(label)}".strip()
    phrase = f"{UNITS[label][0]} of {noun}" if label in UNITS else noun
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def several(label: str) -> str:
    """The plural of a class: "knives", "pairs of scissors"."""
    if label in UNITS:
        return f"{UNITS[label][1]} of {_noun(label)}"
    if label in IRREGULAR:
        return IRREGULAR[label]
    return _noun(label) + ("es" if label.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _noun(label: str) -> str:
    return label.replace("tv", "TV")


def _contents(tag: str, rng: np.random.Generator) -> Iterator[Content]:
    """All contents of a tag in random order."""
    for i in rng.permutation(math.prod(_AXES[tag])):
        content = _content(tag, *map(int, np.unravel_index(i, _AXES[tag])))
        if content is not None:
            yield content


def _content(tag: str, *choice: int) -> Content | None:
    """The content at a place of a tag's axes; None where there is none: an object beside its like, a person's colour,
    an orange orange."""
    objects = [CLASSES[i] for i in choice[: 1 if tag in ("single_object", "counting", "colors") else 2]]
    rest = choice[len(objects) :]
    if len(set(objects)) < len(objects):
        return None
    include: list[dict[str, Any]] = [{"class": label, "count": 1} for label in objects]
    if tag == "counting":
        number = list(NUMBERS)[rest[0]]
        include[0]["count"] = number
        exclude = [{"class": objects[0], "count": number + 1}]
        return f"{NUMBERS[number]} {several(objects[0])}", {"tag": tag, "include": include, "exclude": exclude}
    if tag == "position":
        relation = RELATIONS[rest[0]]
        # GenEval names the object that the relation is to first.
        subject = {**include[0], "position": [relation, 0]}
        text = f"{one(objects[0])} {relation} {one(objects[1])}"
        return text, {"tag": tag, "include": [include[1], subject]}
    colors = [COLORS[i] for i in rest]
    if len(set(colors)) < len(colors) or (colors and "person" in objects):
        return None
    if any(color == label for color, label in zip(colors, objects, strict=False)):
        return None
    for item, color in zip(include, colors, strict=False):
        item["color"] = color
    text = " and ".join(one(item["class"], item.get("color", "")) for item in include)
    return text, {"tag": tag, "include": include}


def _prompt(wording: str, content: Content) -> Prompt:
    text = wording.format(content[0])
    return Prompt(text, {**content[1], "prompt": text})


def _shares(count: int, weights: Sequence[int]) -> list[int]:
    """`count` split by weight into integers: each rounded down, and one more for those that lost most."""
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    losers = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in losers[: count - sum(shares)]:
        shares[i] += 1
    return shares
