"""GenEval prompts (arXiv 2310.11513) over the 80 classes of COCO, from this project's own templates."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastflowgrpo.prompts.prompt import RELATIONS, TAGS, Prompt

# Weight of each tag in training, as in Flow-GRPO (arXiv 2505.05470); single_object is for the evaluation only.
MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
# Number of prompts of each tag in GenEval's evaluation set.
EVALUATION = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
COUNT = 50_000  # training prompts, as in the paper

# The 80 classes of COCO in its order, with GenEval's names.
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

# Classes that are counted with another word: "two pairs of scissors".
MEASURE_WORDS = {"scissors": ("pair", "pairs"), "skis": ("pair", "pairs"), "broccoli": ("head", "heads")}
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
# The first one is GenEval's own, which the evaluation prompts use.
WORDINGS = tuple(f"{shot} {{}}{setting}" for setting in _SETTINGS for shot in _SHOTS)

# The choices that make a prompt of each tag: the number of options of every choice.
_AXES = {
    "single_object": (len(CLASSES),),
    "two_object": (len(CLASSES), len(CLASSES)),
    "counting": (len(CLASSES), len(NUMBERS)),
    "colors": (len(CLASSES), len(COLORS)),
    "position": (len(CLASSES), len(CLASSES), len(RELATIONS)),
    "color_attr": (len(CLASSES), len(CLASSES), len(COLORS), len(COLORS)),
}

Content = tuple[str, dict[str, Any]]
"""What a prompt asks for: the words, and the GenEval metadata without its "prompt"."""


def generate(count: int = COUNT, seed: int = 0, exclude: Sequence[Prompt] = ()) -> list[Prompt]:
    """Training prompts, all different and shuffled, with the mix of tags `MIX`.

    Other wordings are used only after every content of a tag has appeared in GenEval's own, "a photo of ...".

    Args:
        count: number of prompts.
        seed: seed of the choice and the order.
        exclude: prompts that must not be in the result. If they have GenEval metadata, prompts with the same `meaning`
            in other words or another order are left out too.

    Raises:
        ValueError: there are not enough different prompts.
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
    """553 evaluation prompts in GenEval's wording, as many of each tag as GenEval has, each with another meaning."""
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
    """What GenEval metadata asks for, independent of the order: "a cat left of a dog" equals "a dog right of a cat"."""
    objects = [(item["class"], item["count"], item.get("color", "")) for item in metadata["include"]]
    relations = []
    for item, subject in zip(metadata["include"], objects, strict=True):
        if "position" in item:
            relation, other = item["position"][0], objects[item["position"][1]]
            opposite = {"right of": "left of", "below": "above"}.get(relation)
            relations.append((other, opposite, subject) if opposite else (subject, relation, other))
    return tuple(sorted(objects)), tuple(sorted(relations))


def singular(label: str, color: str = "") -> str:
    """The singular of a class with its article: "an orange bus", "a pair of red scissors"."""
    noun = f"{color} {_noun(label)}".strip()
    phrase = f"{MEASURE_WORDS[label][0]} of {noun}" if label in MEASURE_WORDS else noun
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(label: str) -> str:
    """The plural of a class: "knives", "pairs of scissors"."""
    if label in MEASURE_WORDS:
        return f"{MEASURE_WORDS[label][1]} of {_noun(label)}"
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
    """The content for one combination of choices, or None for a combination that makes no prompt: an object and an
    equal one, a person with a color, an orange orange."""
    objects = [CLASSES[i] for i in choice[: 1 if tag in ("single_object", "counting", "colors") else 2]]
    rest = choice[len(objects) :]
    if len(set(objects)) < len(objects):
        return None
    include: list[dict[str, Any]] = [{"class": label, "count": 1} for label in objects]
    if tag == "counting":
        number = list(NUMBERS)[rest[0]]
        include[0]["count"] = number
        exclude = [{"class": objects[0], "count": number + 1}]
        return f"{NUMBERS[number]} {plural(objects[0])}", {"tag": tag, "include": include, "exclude": exclude}
    if tag == "position":
        relation = RELATIONS[rest[0]]
        # GenEval lists the object that the relation refers to first.
        subject = {**include[0], "position": [relation, 0]}
        text = f"{singular(objects[0])} {relation} {singular(objects[1])}"
        return text, {"tag": tag, "include": [include[1], subject]}
    colors = [COLORS[i] for i in rest]
    if len(set(colors)) < len(colors) or (colors and "person" in objects):
        return None
    if any(color == label for color, label in zip(colors, objects, strict=False)):
        return None
    for item, color in zip(include, colors, strict=False):
        item["color"] = color
    text = " and ".join(singular(item["class"], item.get("color", "")) for item in include)
    return text, {"tag": tag, "include": include}


def _prompt(wording: str, content: Content) -> Prompt:
    text = wording.format(content[0])
    return Prompt(text, {**content[1], "prompt": text})


def _shares(count: int, weights: Sequence[int]) -> list[int]:
    """`count` split by weight into integers: rounded down, plus one for the shares that lost most."""
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    losers = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in losers[: count - sum(shares)]:
        shares[i] += 1
    return shares
