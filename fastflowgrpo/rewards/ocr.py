"""Text rendering: does the image show the text that its prompt quotes?"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards.geneval import Detection
from fastflowgrpo.scoring.contract import RewardBatch, Scores

MIN_SCORE = 0.5  # lines that the reader is less sure of are ignored
SIDES = (384, 576, 768, 960)  # longer sides, in pixels, of the shrunk copies in which RapidOCR looks for text

Reader = Callable[[np.ndarray], list[Detection]]  # from pixels uint8 (H, W, 3), BGR, to the lines of text on them


class OCR:
    """Flow-GRPO's text-rendering reward (arXiv 2505.05470).

    The wanted text stands between the prompt's first pair of double quotes. It is compared by `text_score` with the
    text that is read in the image, whose lines are joined in reading order.

    Args:
        backend: "rapidocr", whose models are part of its wheel, or "paddleocr", which downloads its models.
        settings: for PaddleOCR, such as `lang`, `device` or `text_recognition_model_dir`; RapidOCR takes none.

    Raises:
        ImportError: the backend's extra is not installed.
        ValueError: the backend or a setting is unknown, or PaddleOCR cannot be made.
    """

    pointwise = True

    def __init__(self, backend: str = "rapidocr", **settings: Any) -> None:
        if backend not in READERS:
            hint = did_you_mean(str(backend), READERS)
            raise ValueError(f"unknown backend {backend!r}{hint}, known: {', '.join(READERS)}")
        try:
            import rapidfuzz  # noqa: F401

            self.lines = READERS[backend](**settings)
        except ImportError as error:
            raise ImportError(f'{error}; install it with: pip install "fastflowgrpo[{EXTRAS[backend]}]"') from error

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise a ValueError that names the prompt if one has no text in double quotes."""
        for prompt in prompts:
            quoted_text(prompt.text)

    def read(self, pixels: np.ndarray) -> str:
        """The text on an image, uint8 (H, W, 3) in BGR: its lines in reading order, joined."""
        return "".join(line.label for line in self.lines(pixels))

    def detect(self, batch: RewardBatch) -> list[list[Detection]]:
        """The lines of text on each image."""
        return [self.lines(pixels) for pixels in _bgr(batch)]

    def __call__(self, batch: RewardBatch) -> Scores:
        texts = map(self.read, _bgr(batch))
        pairs = zip(batch.prompts, texts, strict=True)
        return Scores(torch.tensor([text_score(quoted_text(prompt), text) for prompt, text in pairs]))


def _bgr(batch: RewardBatch) -> np.ndarray:
    """The pixels of the images, uint8 (B, H, W, 3)."""
    return batch.images.flip(1).permute(0, 2, 3, 1).cpu().numpy()


def _lines(texts: Sequence[str] | None, outlines: Any, scores: Any) -> list[Detection]:
    """Lines of text from what a reader returns; outlines: a polygon of points (x, y) for each, in pixels."""
    if texts is None:
        return []
    boxes = [np.concatenate([np.min(outline, 0), np.max(outline, 0)]).tolist() for outline in outlines]
    return [Detection(*line, color=None) for line in zip(texts, boxes, map(float, scores), strict=True)]


def quoted_text(prompt: str) -> str:
    """Return the text between the first pair of double quotes; ValueError, naming the prompt, if there is none."""
    match = re.search('"([^"]*)"', prompt)
    if match is None or not _normalise(match[1]):
        raise ValueError(f"prompt {prompt!r} has no text in double quotes for the image to show")
    return match[1]


def text_score(target: str, recognised: str) -> float:
    """Score how much of `target` (not blank) was recognised, from 0 to 1; case and white space are ignored.

    The score is 1 if `target` occurs in `recognised`, else 1 - min(distance, length) / length, with the Levenshtein
    distance of the two texts and the length of `target`.
    """
    from rapidfuzz.distance import Levenshtein

    target, recognised = _normalise(target), _normalise(recognised)
    if target in recognised:
        return 1.0
    return 1 - min(Levenshtein.distance(target, recognised), len(target)) / len(target)


def _normalise(text: str) -> str:
    return "".join(text.split()).lower()


def _rapidocr(**settings: Any) -> Reader:
    for name in settings:
        raise ValueError(f"unknown setting {name!r}{did_you_mean(name, ['weight', 'backend'])}, known: weight, backend")

    def read(pixels: np.ndarray) -> list[Detection]:
        side = next((side for side in SIDES if side >= 0.75 * max(pixels.shape)), SIDES[-1])
        found = _engine(side)(pixels)
        return _lines(found.txts, found.boxes, found.scores)

    _engine(SIDES[0])
    return read


@functools.cache
def _engine(side: int) -> Callable[[Any], Any]:
    """Make RapidOCR, once per process and `side`.

    It looks for text in a copy of the image that is shrunk to `side` pixels (if it is larger), and reads the text in
    the image itself.
    """
    import cv2
    import onnxruntime  # noqa: F401  RapidOCR's default engine; its wheel does not require it
    from rapidocr import RapidOCR

    threads = torch.get_num_threads()  # 1 in worker processes
    cv2.setNumThreads(threads)
    # Faster than RapidOCR's defaults at no loss of accuracy (benchmarks/ocr.py): those enlarge images to 736 pixels
    # and read six lines at a time, all padded to the widest or to 320 pixels. As in Flow-GRPO, upside-down lines are
    # not detected.
    parameters = {
        "Global.log_level": "critical",
        "Global.text_score": MIN_SCORE,
        "Global.use_cls": False,
        "Det.limit_type": "max",
        "Det.limit_side_len": side,
        "Rec.rec_img_shape": [3, 48, 160],
        "Rec.rec_batch_num": 1,
        "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
    }
    return RapidOCR(params=parameters)


def _paddleocr(**settings: Any) -> Reader:
    """Make PaddleOCR 3 without its corrections for scanned pages; it reads the image in its own size."""
    from paddleocr import PaddleOCR

    parameters = {
        "use_doc_orientation_classify": False,
        "use_doc_unwarping": False,
        "use_textline_orientation": False,
        "text_rec_score_thresh": MIN_SCORE,
        "cpu_threads": torch.get_num_threads(),
    }
    try:
        engine = PaddleOCR(**parameters | settings)
    except ImportError:
        raise
    except Exception as error:  # PaddleOCR raises many classes: no network, an unknown argument, a broken model
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"PaddleOCR cannot be made: {reason}") from error

    def read(pixels: np.ndarray) -> list[Detection]:
        found = engine.predict(pixels)[0]
        return _lines(found["rec_texts"], found["rec_polys"], found["rec_scores"])

    return read


READERS: dict[str, Callable[..., Reader]] = {"rapidocr": _rapidocr, "paddleocr": _paddleocr}
EXTRAS = {"rapidocr": "ocr", "paddleocr": "paddle"}
