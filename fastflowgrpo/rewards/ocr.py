"""Text rendering: does the image show the text that its prompt quotes?"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.scoring.contract import RewardBatch, Scores

MIN_SCORE = 0.5  # of the reader's confidence in a line; what is below is not read
SIDES = (384, 576, 768, 960)  # longer sides of the copies of images in which RapidOCR looks for text

Reader = Callable[[np.ndarray], str]  # from pixels (H, W, 3), BGR, to their text


class OCR:
    """Flow-GRPO's text-rendering reward (arXiv 2505.05470): `text_score` of the text between the prompt's first pair of
    double quotes and what is read in the image, its lines joined in reading order.

    Args:
        backend: "rapidocr", whose models come inside its wheel, or "paddleocr", which fetches its own.
        settings: PaddleOCR's, such as `lang`, `device` or `text_recognition_model_dir`; RapidOCR has none.

    Raises:
        ImportError: the backend's extra is not installed.
        ValueError: an unknown backend or setting, or PaddleOCR cannot be made.
    """

    pointwise = True

    def __init__(self, backend: str = "rapidocr", **settings: Any) -> None:
        if backend not in READERS:
            hint = did_you_mean(str(backend), READERS)
            raise ValueError(f"unknown backend {backend!r}{hint}, known: {', '.join(READERS)}")
        try:
            import rapidfuzz  # noqa: F401

            self.read = READERS[backend](**settings)
        except ImportError as error:
            raise ImportError(f'{error}; install it with: pip install "fastflowgrpo[{EXTRAS[backend]}]"') from error

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError, naming the prompt, if one has no text in double quotes."""
        for prompt in prompts:
            quoted_text(prompt.text)

    def __call__(self, batch: RewardBatch) -> Scores:
        arrays = batch.images.flip(1).permute(0, 2, 3, 1).cpu().numpy()
        texts = map(self.read, arrays)
        pairs = zip(batch.prompts, texts, strict=True)
        return Scores(torch.tensor([text_score(quoted_text(prompt), text) for prompt, text in pairs]))


def quoted_text(prompt: str) -> str:
    """The text between the first pair of double quotes; ValueError, naming the prompt, if there is none."""
    match = re.search('"([^"]*)"', prompt)
    if match is None or not _normalise(match[1]):
        raise ValueError(f"prompt {prompt!r} has no text in double quotes for the image to show")
    return match[1]


def text_score(target: str, recognised: str) -> float:
    """How much of `target` (not blank) was recognised, case and white space apart: 1 if it occurs in `recognised`, else
    1 - min(edit distance, length) / length, with the length of the target."""
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

    def read(pixels: np.ndarray) -> str:
        side = next((side for side in SIDES if side >= 0.75 * max(pixels.shape)), SIDES[-1])
        return "".join(_engine(side)(pixels).txts or ())

    _engine(SIDES[0])
    return read


@functools.cache
def _engine(side: int) -> Callable[[Any], Any]:
    """RapidOCR, made once per process, which looks for text in a copy of the image shrunk to `side`, if it is larger,
    and reads it in the image itself."""
    import cv2
    import onnxruntime  # noqa: F401  RapidOCR's default engine, which it does not depend on
    from rapidocr import RapidOCR

    threads = torch.get_num_threads()  # 1 in worker processes
    cv2.setNumThreads(threads)
    # For speed without a loss (benchmarks/ocr.py): RapidOCR itself enlarges images to 736 pixels, and reads lines six
    # at a time, all as wide as the widest or 320. No classifier for upside-down lines, as in Flow-GRPO.
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
    """PaddleOCR 3, at the image's own size and without its correction of scanned pages."""
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
    except Exception as error:  # of any class: no network, an unknown argument, a broken model
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"PaddleOCR cannot be made: {reason}") from error
    return lambda pixels: "".join(engine.predict(pixels)[0]["rec_texts"])


READERS: dict[str, Callable[..., Reader]] = {"rapidocr": _rapidocr, "paddleocr": _paddleocr}
EXTRAS = {"rapidocr": "ocr", "paddleocr": "paddle"}
