"""The GenEval checker on hand-made detections, and the reward around it."""

import math
from typing import Any

import pytest
import torch

from fastflowgrpo.prompts import TAGS, Prompt, check_metadata
from fastflowgrpo.rewards import RewardBatch
from fastflowgrpo.rewards.geneval import Detection, GenEval, GenEvalResult, check, relations


def at(label: str, x: float, y: float, color: str | None = None, score: float = 1.0, size: float = 10) -> Detection:
    """A square object centred at (x, y)."""
    half = size / 2
    return Detection(label, (x - half, y - half, x + half, y + half), score, color)


def include(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


SINGLE = {"tag": "single_object", "include": [include("cat")]}
TWO = {"tag": "two_object", "include": [include("cat"), include("dog")]}
COUNTING = {"tag": "counting", "include": [include("cat", 3)], "exclude": [include("cat", 4)]}
COLORS = {"tag": "colors", "include": [include("cat", color="red")]}
POSITION = {"tag": "position", "include": [include("cat"), include("dog", position=["left of", 0])]}
COLOR_ATTR = {"tag": "color_attr", "include": [include("cat", color="red"), include("dog", color="blue")]}
FAR = (at("dog", 0, 0), at("cat", 50, 0))  # a dog left of a cat

# (name, metadata, detections, score, strict, correct)
CASES: list[tuple[str, dict[str, Any], list[Detection], float, bool, bool]] = [
    ("single", SINGLE, [at("cat", 5, 5)], 1, True, True),
    ("single: others do not matter", SINGLE, [at("cat", 5, 5), at("dog", 9, 9)], 1, True, True),
    ("single: empty image", SINGLE, [], 0, False, False),
    ("single: another class", SINGLE, [at("dog", 5, 5)], 0, False, False),
    ("single: two are enough, not exact", SINGLE, [at("cat", 5, 5), at("cat", 30, 5)], 0, False, True),
    ("single: the count term stops at 0", SINGLE, [at("cat", 20 * i, 5) for i in range(5)], 0, False, True),
    ("two", TWO, list(FAR), 1, True, True),
    ("two: one missing", TWO, [at("cat", 5, 5)], 0.5, False, False),
    ("two: one twice", TWO, [*FAR, at("cat", 90, 0)], 0.5, False, True),
    (
        "two: a negative term must not eat the other",
        TWO,
        [*FAR, *[at("cat", i, 90) for i in range(9)]],
        0.5,
        False,
        True,
    ),
    ("two: empty image", TWO, [], 0, False, False),
    ("two: one on top of the other", TWO, [at("cat", 5, 5), at("dog", 5, 5)], 1, True, True),
    ("counting", COUNTING, [at("cat", 20 * i, 0) for i in range(3)], 1, True, True),
    ("counting: one too few", COUNTING, [at("cat", 20 * i, 0) for i in range(2)], 2 / 3, False, False),
    ("counting: two too few", COUNTING, [at("cat", 0, 0)], 1 / 3, False, False),
    ("counting: one too many is excluded", COUNTING, [at("cat", 20 * i, 0) for i in range(4)], 2 / 3, False, False),
    ("counting: twice as many", COUNTING, [at("cat", 20 * i, 0) for i in range(6)], 0, False, False),
    (
        "counting: without the exclude too many are correct",
        {"tag": "counting", "include": [include("cat", 3)]},
        [at("cat", 20 * i, 0) for i in range(4)],
        2 / 3,
        False,
        True,
    ),
    (
        "exclude: any of several",
        {**SINGLE, "exclude": [include("dog", 1), include("owl", 2)]},
        [at("cat", 0, 0), at("owl", 20, 0), at("owl", 40, 0)],
        1,
        True,
        False,
    ),
    (
        "exclude: below the count is fine",
        {**SINGLE, "exclude": [include("dog", 1), include("owl", 2)]},
        [at("cat", 0, 0), at("owl", 20, 0)],
        1,
        True,
        True,
    ),
    ("colors", COLORS, [at("cat", 0, 0, "red")], 1, True, True),
    ("colors: wrong", COLORS, [at("cat", 0, 0, "blue")], 0.5, False, False),
    ("colors: not classified", COLORS, [at("cat", 0, 0)], 0.5, False, False),
    ("colors: another object has it", COLORS, [at("cat", 0, 0, "blue"), at("dog", 20, 0, "red")], 0.5, False, False),
    ("colors: no object", COLORS, [at("dog", 0, 0, "red")], 0, False, False),
    (
        "colors: the best of two is right",
        COLORS,
        [at("cat", 0, 0, "blue", score=0.4), at("cat", 20, 0, "red", score=0.9)],
        0,
        False,
        True,
    ),
    (
        "colors: the best of two is wrong",
        COLORS,
        [at("cat", 0, 0, "blue", score=0.9), at("cat", 20, 0, "red", score=0.4)],
        0,
        False,
        False,
    ),
    (
        "colors: two of three",
        {"tag": "colors", "include": [include("cat", 3, color="red")]},
        [at("cat", 0, 0, "red"), at("cat", 20, 0, "blue"), at("cat", 40, 0, "red")],
        (1 + 2 / 3) / 2,
        False,
        False,
    ),
    ("position", POSITION, list(FAR), 1, True, True),
    ("position: wrong side", POSITION, [at("cat", 0, 0), at("dog", 50, 0)], 2 / 3, False, False),
    ("position: above instead", POSITION, [at("dog", 0, 0), at("cat", 0, 50)], 2 / 3, False, False),
    ("position: diagonal", POSITION, [at("dog", 0, 0), at("cat", 50, 50)], 1, True, True),
    ("position: one hides the other", POSITION, [at("dog", 5, 5), at("cat", 5, 5)], 2 / 3, False, False),
    ("position: no target", POSITION, [at("dog", 0, 0)], 1 / 3, False, False),
    ("position: no object", POSITION, [at("cat", 0, 0)], 1 / 3, False, False),
    ("position: two targets, both right", POSITION, [*FAR, at("cat", 90, 0, score=0.5)], 1 / 3, False, True),
    ("position: the best target is wrong", POSITION, [*FAR, at("cat", -90, 0, score=2)], 1 / 3, False, False),
    ("position: two objects, the best right", POSITION, [*FAR, at("dog", 90, 0, score=0.5)], 1 / 3, False, True),
    ("position: empty image", POSITION, [], 0, False, False),
    (
        "position: each object to each target",
        {"tag": "position", "include": [include("cat", 2), include("dog", 2, position=["above", 0])]},
        [at("dog", 0, 0), at("dog", 20, 40), at("cat", 0, 60), at("cat", 20, 41)],
        2 / 3,
        False,
        False,
    ),
    (
        "position: to an include whose own colour is wrong",
        {"tag": "position", "include": [include("cat", color="red"), include("dog", position=["left of", 0])]},
        [at("dog", 0, 0), at("cat", 50, 0, "blue")],
        (1 + 0 + 1 + 0) / 4,
        False,
        False,
    ),
    (
        "position: lost with the own colour",
        {"tag": "position", "include": [include("cat"), include("dog", color="red", position=["left of", 0])]},
        [at("dog", 0, 0, "blue"), at("cat", 50, 0)],
        (1 + 1 + 0 + 0) / 4,
        False,
        False,
    ),
    (
        "position: to the second include",
        {
            "tag": "position",
            "include": [include("owl"), include("cat"), include("dog", position=["below", 1])],
        },
        [at("owl", 0, 90), at("cat", 0, 0), at("dog", 0, 50)],
        1,
        True,
        True,
    ),
    ("color_attr", COLOR_ATTR, [at("cat", 0, 0, "red"), at("dog", 50, 0, "blue")], 1, True, True),
    ("color_attr: swapped", COLOR_ATTR, [at("cat", 0, 0, "blue"), at("dog", 50, 0, "red")], 0.5, False, False),
    ("color_attr: one wrong", COLOR_ATTR, [at("cat", 0, 0, "red"), at("dog", 50, 0, "red")], 0.75, False, False),
    ("color_attr: one missing", COLOR_ATTR, [at("cat", 0, 0, "red")], 0.5, False, False),
    ("color_attr: empty image", COLOR_ATTR, [], 0, False, False),
]


@pytest.mark.parametrize(
    "metadata, detections, score, strict, correct", [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_cases(metadata, detections, score, strict, correct):
    check_metadata(metadata)
    result = check(metadata, detections)
    assert (result.score, result.strict, result.correct) == (pytest.approx(score), strict, correct)


def test_cases_cover_every_tag_both_ways():
    for tag in TAGS:
        assert {case[4] for case in CASES if case[1]["tag"] == tag} == {True, False}
        assert {case[5] for case in CASES if case[1]["tag"] == tag} == {True, False}


def test_at_most_sixteen_objects_of_a_class():
    many = [at("cat", 20 * i, 0, "red" if i < 16 else "blue", score=1 - i / 100) for i in range(20)]
    sixteen = {"tag": "counting", "include": [include("cat", 16, color="red")], "exclude": [include("cat", 17)]}
    assert check(sixteen, many[::-1]) == GenEvalResult(1.0, True, True)
    seventeen = {"tag": "counting", "include": [include("cat", 17)]}
    assert check(seventeen, many) == GenEvalResult(16 / 17, False, False)


@pytest.mark.parametrize(
    "dx, dy, expected",
    [
        (-50, 0, {"left of"}),
        (50, 0, {"right of"}),
        (0, -50, {"above"}),
        (0, 50, {"below"}),
        (-50, -50, {"left of", "above"}),
        (50, 50, {"right of", "below"}),
        (50, -10, {"right of"}),
        (-10, 50, {"below"}),
        (0, 0, set()),
        # Boxes of side 10: 0.1 of their summed sizes is 2, and the offset less 2 must exceed half of the offset.
        (2, 0, set()),
        (4, 0, set()),
        (4.01, 0, {"right of"}),
        (-4, 0, set()),
        (-4.01, 0, {"left of"}),
        (0, 4, set()),
        (0, 4.01, {"below"}),
        (0, -4, set()),
        (0, -4.01, {"above"}),
        # Less 2 each, (8, 6) of a distance of 12.8: 0.62 and 0.47.
        (10, 8, {"right of"}),
        (10, 9, {"right of", "below"}),
    ],
)
def test_relations(dx, dy, expected):
    assert relations(at("a", 30 + dx, 40 + dy), at("b", 30, 40)) == expected


def test_relations_use_both_sizes_and_each_axis():
    wide = Detection("a", (0, 0, 100, 10), 1, None)  # centre (50, 5); with a side of 10 beside it, 0.1 of 110 is 11
    assert relations(wide, at("b", 50 - 22, 5)) == set()
    assert relations(wide, at("b", 50 - 22.1, 5)) == {"right of"}
    assert relations(at("b", 50 - 22.1, 5), wide) == {"left of"}
    assert relations(wide, at("b", 50, 5 - 4.1)) == {"below"}


def test_the_order_of_detections_does_not_matter():
    best_red = [at("cat", 0, 0, "red", score=0.9), at("cat", 20, 0, "blue", score=0.4), at("dog", 90, 0, score=0.6)]
    assert check(COLORS, best_red) == check(COLORS, best_red[::-1]) == GenEvalResult(0.0, False, True)


@pytest.mark.parametrize("x", [4, 4.01])
def test_position_threshold_decides_the_result(x):
    result = check(POSITION, [at("dog", 0, 0), at("cat", x, 0)])
    assert (result.strict, result.correct) == (x > 4, x > 4)


def batch(metadata: list[dict[str, Any]]) -> RewardBatch:
    n = len(metadata)
    return RewardBatch(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), ["p"] * n, metadata, torch.arange(n))


def test_reward_mixes_score_and_strict():
    answers = [[at("cat", 0, 0)], [at("cat", 0, 0)], [], [at("cat", 0, 0), at("dog", 9, 9), at("dog", 30, 9)]]
    given = batch([SINGLE, TWO, TWO, TWO])

    def detector(images: torch.Tensor, metadata: list[dict[str, Any]]) -> list[list[Detection]]:
        assert images is given.images and metadata is given.metadata
        return answers

    scores = GenEval(detector, strict=0.6)(given)
    assert torch.allclose(scores.details["score"], torch.tensor([1, 0.5, 0, 0.5]))
    assert scores.details["strict"].tolist() == [1, 0, 0, 0]
    assert scores.details["correct"].tolist() == [1, 0, 0, 1]
    assert torch.allclose(scores.values, torch.tensor([1, 0.2, 0, 0.2]))
    assert scores.values.dtype == torch.float32
    assert torch.equal(GenEval(detector)(given).values, scores.details["score"])
    assert torch.equal(GenEval(detector, strict=1)(given).values, scores.details["strict"])


def test_reward_of_nothing():
    scores = GenEval(lambda images, metadata: [])(batch([]))
    assert scores.values.shape == scores.details["strict"].shape == (0,)


def test_detector_must_answer_for_each_image():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        GenEval(lambda images, metadata: [[]])(batch([SINGLE, SINGLE]))


def test_settings_errors():
    wrong: list[Any] = [-0.1, 1.1, math.nan, "0.6", True, None]
    for strict in wrong:
        with pytest.raises(ValueError, match="strict must be a number from 0 to 1, got"):
            GenEval(lambda images, metadata: [], strict=strict)
    with pytest.raises(ValueError, match=r"unknown detector 'shape' \(did you mean 'shapes'\?\), known: shapes"):
        GenEval("shape")
    with pytest.raises(ValueError, match="unknown detector 3, known: shapes"):
        GenEval(3)  # type: ignore[arg-type]


def test_check_prompts():
    reward = GenEval(lambda images, metadata: [])
    reward.check_prompts([Prompt("a", SINGLE), Prompt("b", POSITION)])
    with pytest.raises(ValueError, match=r"^prompt 'an owl' has no GenEval metadata: read prompts from a GenEval \.js"):
        reward.check_prompts([Prompt("a", SINGLE), Prompt("an owl")])
    with pytest.raises(ValueError, match=r"^prompt 'an owl': include: missing, expected a non-empty list"):
        reward.check_prompts([Prompt("an owl", {"tag": "counting"})])


def test_shapes_detector_knows_only_shapes():
    reward = GenEval("shapes")
    reward.check_prompts([Prompt("a circle", {"tag": "single_object", "include": [include("circle")]})])
    with pytest.raises(ValueError, match=r"^prompt 'a cat': the detector knows circle, .*, not 'cat'$"):
        reward.check_prompts([Prompt("a cat", SINGLE)])
    blank = RewardBatch(torch.full((2, 3, 48, 48), 240, dtype=torch.uint8), ["a"] * 2, [SINGLE] * 2, torch.arange(2))
    assert reward(blank).values.tolist() == [0, 0]
