"""The reward contract and its weighted sum, JPEG and OCR."""

import math
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.ocr import pillow_font, rendered
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import REWARDS, RewardBatch, Scores, WeightedRewards, build_rewards, ocr
from fastflowgrpo.rewards.jpeg import kilobytes
from fastflowgrpo.rewards.ocr import OCR, quoted_text, text_score


def batch(images: torch.Tensor, prompts: list[str] | None = None) -> RewardBatch:
    n = len(images)
    return RewardBatch(images, prompts or ["a prompt"] * n, [{}] * n, torch.zeros(n, dtype=torch.int64))


BLACK = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of rewards into the current directory, and imports it anew in each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def write(text: str, name: str = "my_rewards") -> None:
        (tmp_path / f"{name}.py").write_text(text)

    return write


# the weighted sum


def weighted(**rewards: tuple[float, Any]) -> WeightedRewards:
    return WeightedRewards(
        {name: partial(lambda answer, batch: answer, answer) for name, (_, answer) in rewards.items()},
        {name: weight for name, (weight, _) in rewards.items()},
    )


def test_weighted_sum_and_details():
    first = Scores(torch.tensor([1.0, 2.0, 3.0]), {"strict": torch.tensor([0.0, 1.0, 1.0])})
    scores = weighted(a=(0.5, first), b=(-2.0, [1, 0, 2]))(batch(BLACK))
    assert scores.values.tolist() == [-1.5, 1.0, -2.5]
    assert {name: value.tolist() for name, value in scores.details.items()} == {
        "a": [1, 2, 3],
        "a/strict": [0, 1, 1],
        "b": [1, 0, 2],
    }
    assert first.values.tolist() == [1, 2, 3], "what a reward returned is not changed"


def test_a_missing_score_makes_the_sum_missing_unless_its_weight_is_0():
    nan = math.nan
    answer = [1.0, nan, 3.0]
    scores = weighted(a=(1.0, [1.0, 1.0, nan]), b=(2.0, answer))(batch(BLACK))
    assert scores.values[0] == 3 and scores.values[1:].isnan().all()
    assert torch.equal(scores.details["b"].isnan(), torch.tensor([False, True, False]))
    unweighted = weighted(a=(1.0, [1.0, 2.0, 3.0]), b=(0.0, answer))(batch(BLACK))
    assert unweighted.values.tolist() == [1, 2, 3]
    assert unweighted.details["b"].isnan().tolist() == [False, True, False]
    assert scores.error == "reward b: it returned NaN" and unweighted.error == ""
    blurred = Scores(torch.tensor([1.0, nan, nan]), error="blurred")
    assert weighted(a=(1.0, blurred), b=(1.0, [1.0, 1.0, 1.0]))(batch(BLACK)).error == "reward a: blurred"


def test_scores_one_after_the_other_keep_the_last_error():
    parts = [Scores.missing(1, "first"), Scores(torch.ones(1)), Scores.missing(2, "second"), Scores(torch.ones(1))]
    joined = Scores.cat(parts)
    assert joined.error == "second" and joined.values.isnan().tolist() == [True, False, True, True, False]


@pytest.mark.parametrize(
    "answer",
    [
        [1, 0, 2],
        (1.0, 0.0, 2.0),
        np.array([1, 0, 2]),
        np.array([1, 0, 2], np.float16),
        torch.tensor([1, 0, 2], dtype=torch.bfloat16),
        torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True),
        [torch.tensor(1.0), np.float32(0), 2],
        Scores(torch.tensor([1, 0, 2])),
    ],
)
def test_what_a_reward_may_return(answer):
    scores = weighted(mine=(1.0, answer))(batch(BLACK))
    for values in (scores.values, scores.details["mine"]):
        assert values.dtype == torch.float32 and values.tolist() == [1, 0, 2] and not values.requires_grad


@pytest.mark.parametrize(
    "answer, error, message",
    [
        ([1, 2], ValueError, r"reward mine: expected 3 numbers, one per image, got shape \(2,\)"),
        (torch.zeros(3, 1), ValueError, r"reward mine: expected 3 numbers, one per image, got shape \(3, 1\)"),
        (1.0, ValueError, r"reward mine: expected 3 numbers, one per image, got shape \(\)"),
        (None, TypeError, r"reward mine: expected 3 numbers, one per image, got NoneType"),
        (["a", "b", "c"], TypeError, r"reward mine: expected 3 numbers, one per image, got list"),
        ({"a": 1}, TypeError, r"reward mine: expected 3 numbers, one per image, got dict"),
        ([1, None, 2], TypeError, r"reward mine: expected 3 numbers, one per image, got list"),
        ([1, 2, math.inf], ValueError, r"reward mine: infinite for image 2; NaN marks a failure"),
        ([1, -1e300, 2], ValueError, r"reward mine: infinite for image 1; NaN marks a failure"),
        (Scores(torch.zeros(4)), ValueError, r"reward mine: expected 3 numbers, one per image, got shape \(4,\)"),
        (Scores(torch.zeros(3), {"x": torch.zeros(1)}), ValueError, r"reward mine/x: expected 3 numbers.*shape \(1,\)"),
    ],
)
def test_what_a_reward_may_not_return(answer, error, message):
    with pytest.raises(error, match="^" + message):
        weighted(fine=(1.0, [1, 2, 3]), mine=(1.0, answer))(batch(BLACK))


def test_an_exception_in_a_reward_names_it():
    def broken(batch: RewardBatch) -> Scores:
        raise KeyError("lost")

    with pytest.raises(RuntimeError, match=r"^reward broken: KeyError: 'lost'$") as error:
        WeightedRewards({"broken": broken}, {"broken": 1.0})(batch(BLACK))
    assert isinstance(error.value.__cause__, KeyError)


# configuration


def test_build_from_weights_and_settings():
    rewards = build_rewards(
        {"jpeg_compressibility": 2, "jpeg_incompressibility": {"weight": 0.5}, "geneval": {"strict": 0.25}}
    )
    assert rewards.weights == {"jpeg_compressibility": 2.0, "jpeg_incompressibility": 0.5, "geneval": 1.0}
    assert rewards.rewards["geneval"].strict == 0.25  # type: ignore[attr-defined]


def test_build_leaves_the_configuration_alone():
    config = {"geneval": {"weight": 1.0, "strict": 0.6}}
    build_rewards(config)
    assert config == {"geneval": {"weight": 1.0, "strict": 0.6}}


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {},
            r"rewards: name at least one; known: geneval, shapes_edit, .*, or my_module:my_reward for your",
        ),
        ({"genevel": 1}, r"rewards: unknown reward 'genevel' \(did you mean 'geneval'\?\); known: geneval, shap"),
        ({"zzz": 1}, r"rewards: unknown reward 'zzz'; known: geneval, "),
        ({"geneval": "high"}, r"rewards\.geneval: the weight must be a finite number, got 'high'"),
        ({"geneval": None}, r"rewards\.geneval: the weight must be a finite number, got None"),
        ({"geneval": True}, r"rewards\.geneval: the weight must be a finite number, got True"),
        ({"geneval": {"weight": math.nan}}, r"rewards\.geneval: the weight must be a finite number, got nan"),
        ({"geneval": {"weight": math.inf}}, r"rewards\.geneval: the weight must be a finite number, got inf"),
        ({"geneval": 0, "jpeg_compressibility": 0.0}, r"rewards: every weight is 0"),
        (
            {"geneval": {"strickt": 1}},
            r"rewards\.geneval: unknown setting 'strickt' \(did you mean 'strict'\?\), known: weight, detector, stric",
        ),
        ({"geneval": {"wieght": 1}}, r"rewards\.geneval: unknown setting 'wieght' \(did you mean 'weight'\?\)"),
        ({"geneval": {"strict": 2}}, r"rewards\.geneval: strict must be a number from 0 to 1, got 2"),
        ({"geneval": {"detector": "yolo"}}, r"rewards\.geneval: unknown detector 'yolo', known: shapes"),
        (
            {"jpeg_compressibility": {"quality": 90}},
            r"rewards\.jpeg_compressibility: unknown setting 'quality', known: w",
        ),
    ],
)
def test_configuration_errors(config, message):
    with pytest.raises(ValueError, match="^" + message) as error:
        build_rewards(config)
    assert "\n" not in str(error.value)


USER = """
import torch
from fastflowgrpo.rewards import Scores

def brightness(batch, scale=1.0):
    return scale * batch.images.float().mean((1, 2, 3))

def full(batch):
    return Scores(torch.arange(len(batch.prompts)), {"length": torch.tensor([len(p) for p in batch.prompts])})

def anything(batch, **settings):
    return [settings["power"]] * len(batch.prompts)

def check(prompts):
    raise ValueError(f"cannot score {prompts[0].text}")

brightness.check_prompts = check
number = 3
"""


def test_user_functions(module):
    module(USER)
    rewards = build_rewards(
        {
            "my_rewards:brightness": {"weight": 0.5, "scale": 2.0},
            "my_rewards:full": 1,
            "my_rewards:anything": {"power": 7},
        }
    )
    scores = rewards(batch(BLACK + 10))
    assert scores.values.tolist() == [17.0, 18.0, 19.0]
    assert scores.details["my_rewards:brightness"].tolist() == [20, 20, 20]
    assert scores.details["my_rewards:full/length"].tolist() == [8, 8, 8]
    with pytest.raises(ValueError, match=r"^rewards\.my_rewards:brightness: cannot score a cat$"):
        rewards.check_prompts([Prompt("a cat")])


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("my_reward:full", 1, r"cannot import 'my_reward': ModuleNotFoundError: No module named 'my_reward'"),
        ("my_rewards:ful", 1, r"my_rewards has no function 'ful' \(did you mean 'full'\?\)"),
        ("my_rewards:number", 1, r"my_rewards has no function 'number'"),
        ("my_rewards:", 1, r"my_rewards has no function ''"),
        (":full", 1, r"cannot import '': ValueError: Empty module name"),
        ("broken:full", 1, r"cannot import 'broken': ModuleNotFoundError: No module named 'surely_not_there'"),
        ("raising:full", 1, r"cannot import 'raising': ZeroDivisionError: division by zero"),
        ("my_rewards:full", {"scale": 1}, r"unknown setting 'scale', known: weight$"),
        (
            "my_rewards:brightness",
            {"scal": 1},
            r"unknown setting 'scal' \(did you mean 'scale'\?\), known: weight, scale$",
        ),
        ("my_rewards:brightness", {"batch": 1}, r"unknown setting 'batch'"),
    ],
)
def test_user_function_errors(module, name, settings, message):
    module(USER)
    module("import surely_not_there", "broken")
    module("1 / 0", "raising")
    with pytest.raises(ValueError, match=rf"^rewards\.{name}: {message}"):
        build_rewards({name: settings})


def test_check_prompts_names_the_reward():
    rewards = build_rewards({"jpeg_compressibility": 1, "geneval": 1})
    with pytest.raises(ValueError, match=r"^rewards\.geneval: prompt 'a cat' has no GenEval metadata"):
        rewards.check_prompts([Prompt("a cat")])
    build_rewards({"jpeg_compressibility": 1}).check_prompts([Prompt("a cat")])


# JPEG


def test_jpeg_size_orders_images():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(3, 64, 64)
    flat = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    images = torch.stack([noise, flat, ramp])
    small = REWARDS["jpeg_compressibility"]()(batch(images)).values
    large = REWARDS["jpeg_incompressibility"]()(batch(images)).values
    assert small.argsort().tolist() == [0, 2, 1] and torch.equal(small, -large)
    assert torch.allclose(large, kilobytes(images) / 500) and large.dtype == torch.float32


def test_jpeg_size_is_that_of_the_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 40, 56), generator=generator, dtype=torch.uint8)
    images[:, 1:] //= 3  # channels of different content: a swap of channels or axes changes the size
    for image, size in zip(images, kilobytes(images).tolist(), strict=True):
        path = tmp_path / "image.jpg"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=95)
        assert size == pytest.approx(path.stat().st_size / 1000)


# OCR


def test_text_score():
    assert text_score("Hello World", "HELLO\u3000worl d") == 1
    assert text_score("Flow", "the flow of time") == 1, "found among other text"
    assert text_score("flow", "fl0w") == pytest.approx(3 / 4)
    assert text_score("flow", "glowing") == 0, "four edits of four letters"
    assert text_score("flow", "glows") == pytest.approx(2 / 4)
    assert text_score("flow", "") == 0
    assert text_score("flow", "something else entirely") == 0, "never below 0"


def test_quoted_text():
    assert quoted_text('a sign that says "Stop Here" and "Go"') == "Stop Here"
    for prompt in ("a sign that says Stop", 'one "quote', 'an empty "" pair', 'a blank " " pair'):
        with pytest.raises(
            ValueError, match=rf"^prompt '{prompt}' has no text in double quotes for the image to show$"
        ):
            quoted_text(prompt)


def test_ocr_score_joins_the_boxes_and_reads_rgb(monkeypatch):
    seen = []

    def engine(pixels: np.ndarray) -> SimpleNamespace:
        seen.append(pixels)
        texts = [("Hello", "World"), None, ("Help",)][len(seen) - 1]
        outlines = texts and [[(4, 2), (9, 3), (9, 6), (4, 5)]] * len(texts)
        return SimpleNamespace(txts=texts, boxes=outlines, scores=texts and [0.9] * len(texts))

    monkeypatch.setattr(ocr, "_engine", lambda side: engine)
    images = torch.zeros(3, 3, 20, 30, dtype=torch.uint8)
    images[:, 0] = 200
    scores = OCR()(batch(images, ['"hello world"', '"a" b', 'the "hello" c']))
    assert scores.values.tolist() == pytest.approx([1, 0, 3 / 5])
    assert all(pixels.shape == (20, 30, 3) and pixels[0, 0].tolist() == [0, 0, 200] for pixels in seen)
    seen.clear()
    found = OCR().detect(batch(images, ["a", "b", "c"]))
    assert [[line.label for line in lines] for lines in found] == [["Hello", "World"], [], ["Help"]]
    assert found[2][0].box == [4, 2, 9, 6] and found[2][0].score == 0.9


def test_ocr_data_errors(monkeypatch):
    monkeypatch.setattr(ocr, "_engine", lambda side: None)
    rewards = build_rewards({"ocr": 1})
    rewards.check_prompts([Prompt('a "b"')])
    with pytest.raises(ValueError, match=r"^rewards\.ocr: prompt 'a cat' has no text in double quotes"):
        rewards.check_prompts([Prompt('a "b"'), Prompt("a cat")])


@pytest.mark.parametrize("missing", ["rapidocr", "onnxruntime", "rapidfuzz"])
def test_ocr_without_its_extra(monkeypatch, missing):
    for name in ("rapidocr", "onnxruntime", "rapidfuzz"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else SimpleNamespace(RapidOCR=dict))
    monkeypatch.setattr(ocr, "_engine", ocr._engine.__wrapped__)
    message = rf'^rewards\.ocr: .*{missing}.*; install it with: pip install "fastflowgrpo\[ocr\]"$'
    with pytest.raises(ValueError, match=message):
        build_rewards({"ocr": 1})


@pytest.mark.parametrize("shape, side", [((48, 48), 384), ((512, 512), 384), ((400, 520), 576), ((2048, 300), 960)])
def test_ocr_looks_for_text_in_a_smaller_copy(monkeypatch, shape, side):
    sides = []

    def engine(side):
        sides.append(side)
        return lambda pixels: SimpleNamespace(txts=("a",), boxes=[[(0, 0), (1, 1)]], scores=[1.0])

    monkeypatch.setattr(ocr, "_engine", engine)
    assert OCR()(batch(torch.zeros(1, 3, *shape, dtype=torch.uint8), ['"a"'])).values.item() == 1
    assert sides[-1] == side


@pytest.mark.parametrize("threads", [1, 2])
def test_ocr_computes_with_torchs_threads(monkeypatch, threads):
    """One in a worker process: processes that each took all cores would get in each other's way."""
    found = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(setNumThreads=found.append))
    monkeypatch.setitem(sys.modules, "rapidocr", SimpleNamespace(RapidOCR=lambda params: params))
    parameters = ocr._engine.__wrapped__(384)
    assert found == [threads] and parameters["EngineConfig.onnxruntime.intra_op_num_threads"] == threads


class PaddleStub:
    """What PaddleOCR 3.7 answers, but for the network."""

    error: Exception | None = None

    def __init__(self, **parameters):
        if self.error:
            raise self.error
        PaddleStub.parameters, PaddleStub.seen = parameters, []

    def predict(self, pixels):
        self.seen.append(pixels)
        texts = [["Hello", "World"], [], ["Help"]][len(self.seen) - 1]
        return [
            {
                "rec_texts": texts,
                "rec_scores": [0.9] * len(texts),
                "rec_polys": [[(0, 0), (1, 1)]] * len(texts),
                "model_settings": {},
            }
        ]


@pytest.fixture
def paddle(monkeypatch):
    monkeypatch.setitem(sys.modules, "paddleocr", SimpleNamespace(PaddleOCR=PaddleStub))
    monkeypatch.setattr(PaddleStub, "error", None)
    return PaddleStub


def test_paddleocr_is_scored_alike(paddle):
    reward = build_rewards({"ocr": {"backend": "paddleocr", "lang": "en"}}).rewards["ocr"]
    images = torch.zeros(3, 3, 20, 30, dtype=torch.uint8)
    images[:, 0] = 200
    scores = reward(batch(images, ['"hello world"', '"a" b', 'the "hello" c']))
    assert scores.values.tolist() == pytest.approx([1, 0, 3 / 5])
    assert all(pixels.shape == (20, 30, 3) and pixels[0, 0].tolist() == [0, 0, 200] for pixels in paddle.seen)
    assert paddle.parameters["lang"] == "en" and paddle.parameters["text_rec_score_thresh"] == 0.5
    assert not any(value for name, value in paddle.parameters.items() if name.startswith("use_"))


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (
            {"backend": "paddelocr"},
            None,
            r"unknown backend 'paddelocr' \(did you mean 'paddleocr'\?\), known: rapidocr,",
        ),
        (
            {"backned": "paddleocr"},
            None,
            r"unknown setting 'backned' \(did you mean 'backend'\?\), known: weight, back",
        ),
        ({"backend": "paddleocr"}, Exception("No model hoster\nTry"), "PaddleOCR cannot be made: No model hoster$"),
        ({"backend": "paddleocr"}, ImportError("No paddle"), r'No paddle; .* pip install "fastflowgrpo\[paddle\]"$'),
    ],
)
def test_ocr_settings_errors(paddle, monkeypatch, settings, error, message):
    monkeypatch.setattr(ocr, "_engine", lambda side: None)
    monkeypatch.setattr(paddle, "error", error)
    with pytest.raises(ValueError, match=rf"^rewards\.ocr: {message}"):
        build_rewards({"ocr": settings})


def drawn(text: str, side: int, font_size: int, ink: str = "black", paper: str = "white") -> torch.Tensor:
    image = Image.new("RGB", (side, side), paper)
    ImageDraw.Draw(image).text((side / 10, side / 3), text, fill=ink, font=ImageFont.load_default(font_size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_ocr_reads_rendered_text(capfd):
    pytest.importorskip("rapidocr")
    reward = OCR()
    engines = ocr._engine.cache_info().currsize
    OCR()
    assert ocr._engine.cache_info().currsize == engines, "one engine per process"
    for side, font_size in ((96, 16), (256, 30), (512, 20), (512, 90)):
        images = torch.stack(
            [
                drawn("Hello 42", side, font_size),
                drawn("Hello\n42", side, font_size, ink="yellow", paper="navy"),
                drawn("Hxllo 42", side, font_size),
                drawn("", side, font_size),
            ]
        )
        values = reward(batch(images, ['a sign with "hello 42" on it'] * 4)).values
        assert values.tolist() == pytest.approx([1, 1, 6 / 7, 0]), (side, font_size)
    noise = torch.randint(0, 256, (1, 3, 128, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert reward(batch(noise, ['"hello 42"'])).values.item() <= 0.2
    assert capfd.readouterr() == ("", ""), "quiet"


def test_ocr_reads_texts_of_all_kinds():
    """RapidOCR's own settings reach 0.92 on these."""
    images = list(rendered(2, [pillow_font]))
    scores = OCR()(batch(torch.stack([image.pixels for image in images]), [image.prompt for image in images]))
    assert scores.values.mean() >= 0.99
