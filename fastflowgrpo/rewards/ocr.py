"""Text rendering: does the image show the text that its prompt quotes?"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards.contract import RewardBatch, Scores


class OCR:
    """Flow-GRPO's text-rendering reward (arXiv 2505.05470): `text_score` of the text between the prompt's first pair of
    double quotes and what RapidOCR reads, its boxes joined in reading order. The models come inside RapidOCR's wheel.

    Raises:
        ImportError: the ocr extra is not installed.
    """

    pointwise = True

    def __init__(self) -> None:
        self.engine = _engine()

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError, naming the prompt, if one has no text in double quotes."""
        for prompt in prompts:
            quoted_text(prompt.text)

    def __call__(self, batch: RewardBatch) -> Scores:
        values = []
        # RapidOCR takes arrays as OpenCV's: height, width, BGR.
        arrays = batch.images.flip(1).permute(0, 2, 3, 1).cpu().numpy()
        for pixels, prompt in zip(arrays, batch.prompts, strict=True):
            recognised = self.engine(pixels).txts or ()
            values.append(text_score(quoted_text(prompt), "".join(recognised)))
        return Scores(torch.tensor(values, dtype=torch.float32))


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


@functools.cache
def _engine() -> Callable[[Any], Any]:
    """RapidOCR, made once per process."""
    try:
        import onnxruntime  # noqa: F401  RapidOCR's default engine, which it does not depend on
        import rapidfuzz  # noqa: F401
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError(f'{error}; install it with: pip install "fastflowgrpo[ocr]"') from error
    # As in Flow-GRPO: no classifier for upside-down boxes, and text is looked for at the image's own size up to 960
    # pixels (RapidOCR would enlarge smaller ones to 736, which takes 2.5 times as long at 512 and reads no more).
    parameters = {
        "Global.log_level": "critical",
        "Global.use_cls": False,
        "Det.limit_type": "max",
        "Det.limit_side_len": 960,
    }
    return RapidOCR(params=parameters)
