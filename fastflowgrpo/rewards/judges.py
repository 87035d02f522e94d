"""Judges: rewards that ask a vision-language model on an OpenAI-compatible server (vLLM, SGLang and others)."""

import base64
import io
import json
import math
import os
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from fastflowgrpo.scoring.client import ServedReward
from fastflowgrpo.scoring.contract import RewardBatch, Scores
from fastflowgrpo.scoring.request import is_http_url

UNIFIEDREWARD = """<image>
You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on \
two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of \
depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color \
accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""

QWENVL = """
Your role is to evaluate the aesthetic quality score of given images.
1. Bad: Extremely blurry, underexposed with significant noise, indiscernible
subjects, and chaotic composition.
2. Poor: Noticeable blur, poor lighting, washed-out colors, and awkward
composition with cut-off subjects.
3. Fair: In focus with adequate lighting, dull colors, decent composition but
lacks creativity.
4. Good: Sharp, good exposure, vibrant colors, thoughtful composition with
a clear focal point.
5. Excellent: Exceptional clarity, perfect exposure, rich colors, masterful
composition with emotional impact.

Please first provide a detailed analysis of the evaluation process, including the criteria for judging aesthetic \
quality, within the <Thought> tag. Then, give a final score from 1 to 5 within the <Score> tag.
<Thought>
[Analyze the evaluation process in detail here]
</Thought>
<Score>X</Score>
"""

DEQA_QUESTION = "How would you rate the quality of this image?"
DEQA_ANSWER = "The quality of the image is"
DEQA_LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}


class Judge(ServedReward):
    """Asks a vision-language model about each image, in one request per image. `ServedReward` says what happens when
    a server fails.

    If an answer holds no score, the image's score is missing (NaN), and the question is not asked again: at temperature
    0 the next answer would be the same. The detail `failed` is 1 for images without a score.

    Args:
        base_url: of the API, such as http://localhost:8000/v1, or a list of servers that give the same answers; by
            default the class's.
        model: the model's name on the server; by default the class's.
        timeout: seconds to wait for an answer.
        concurrency: requests in flight per URL.
        api_key_env: environment variable with the key, if the server wants one.
        required: whether the run waits while no server answers.

    Raises:
        ValueError: a setting is wrong, or the environment variable is not set.
        UserError: when called, if the server refuses the key or does not know the model.
    """

    pointwise = True
    unscorable_statuses = (400, 413, 422)  # a prompt that is too long, an image that is too large
    base_url = "http://127.0.0.1:8000/v1"
    model = ""
    size: int | None = None  # side in pixels of the images sent; None sends them as they are

    def __init__(
        self,
        base_url: str | Sequence[str] | None = None,
        model: str | None = None,
        timeout: float = 120.0,
        concurrency: int = 32,
        api_key_env: str | None = None,
        required: bool = True,
    ) -> None:
        urls = [base_url or self.base_url] if isinstance(base_url, str | None) else base_url
        if not isinstance(urls, list | tuple) or not urls or not all(is_http_url(url) for url in urls):
            raise ValueError(f"base_url must be http://HOST:PORT/v1 or a list of such, got {base_url!r}")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(f"the environment variable {api_key_env} is not set")
        super().__init__(type(self).__name__.lower(), urls, timeout, required, concurrency)
        self.model, self.api_key_env = model or self.model, api_key_env

    @abstractmethod
    def request(self, images: list[dict[str, Any]], prompt: str) -> dict[str, Any]:
        """Return the request's fields, without the model; `images` are the parts of a message that hold an image each:
        the image to score, after its source if `_split` keeps that."""

    @abstractmethod
    def parse(self, choice: dict[str, Any]) -> Scores:
        """Read the score from the first choice of an answer; ValueError if it holds none."""

    def __call__(self, batch: RewardBatch) -> Scores:
        scores = super().__call__(batch)
        scores.details["failed"] = scores.values.isnan().float()
        return scores

    def _split(self, batch: RewardBatch) -> list[RewardBatch]:
        return [replace(batch.rows(slice(row, row + 1)), sources=None) for row in range(len(batch.prompts))]

    def _encode(self, part: RewardBatch) -> tuple[str, bytes, str]:
        images = [_message_part(image, self.size) for image in (*(part.sources or ()), part.images[0])]
        request = self.request(images, part.prompts[0])
        body = json.dumps({"model": self.model, "temperature": 0, **request}).encode()
        return "/chat/completions", body, "application/json"

    def _decode(self, body: bytes, count: int) -> Scores:
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            if not isinstance(choice["message"]["content"], str):
                raise TypeError("no text")
        except (LookupError, TypeError, RecursionError, ValueError):
            raise ValueError(f"expected a chat completion, got {body[:200].decode(errors='replace')!r}") from None
        try:
            return self.parse(choice)
        except ValueError as error:
            return Scores.missing(1, str(error))

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {os.environ[self.api_key_env]}"} if self.api_key_env else {}


class UnifiedReward(Judge):
    """UnifiedReward (arXiv 2503.05236): how well the image fits the prompt, and its quality. The score is the number
    after "Final Score:" divided by 5, so 0.2 to 1.

    The question, and the image size of 512 x 512 pixels, are Flow-GRPO's.
    """

    base_url = "http://127.0.0.1:17140/v1"
    model = "UnifiedReward-7b-v1.5"
    size = 512

    def request(self, images: list[dict[str, Any]], prompt: str) -> dict[str, Any]:
        return {"messages": [_user(images, UNIFIEDREWARD.format(prompt=prompt))]}

    def parse(self, choice: dict[str, Any]) -> Scores:
        return _written_score(r"Final Score:[\s*]*(\d+(?:\.\d+)?)", choice)


class QwenVL(Judge):
    """Aesthetic quality, judged by Qwen2.5-VL (arXiv 2502.13923): the number in <Score> divided by 5, so 0.2 to 1.

    The question is Flow-GRPO's; it does not use the prompt.
    """

    model = "Qwen/Qwen2.5-VL-7B-Instruct"

    def request(self, images: list[dict[str, Any]], prompt: str) -> dict[str, Any]:
        return {"messages": [_user(images, QWENVL)], "max_tokens": 2048}

    def parse(self, choice: dict[str, Any]) -> Scores:
        return _written_score(r"<Score>\s*(\d+(?:\.\d+)?)\s*</Score>", choice)


class DeQA(Judge):
    """DeQA-Score (arXiv 2501.11561), image quality: the expected level divided by 5, so 0.2 to 1. It does not use the
    prompt.

    The model continues the sentence "The quality of the image is". The levels are excellent 5, good 4, fair 3, poor 2
    and bad 1. Their probabilities are those of these words as the next token, normalised to sum to 1; a word that is
    not among the 20 most likely tokens has probability 0. The score is missing if other tokens together are more likely
    than the five words.

    The server must be able to continue a partial answer (`continue_final_message`, as in vLLM) and return `logprobs`.
    """

    model = "zhiyuanyou/DeQA-Score-Mix3"

    def request(self, images: list[dict[str, Any]], prompt: str) -> dict[str, Any]:
        return {
            "messages": [_user(images, DEQA_QUESTION), {"role": "assistant", "content": DEQA_ANSWER}],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
        }

    def parse(self, choice: dict[str, Any]) -> Scores:
        probabilities = dict.fromkeys(DEQA_LEVELS, 0.0)
        try:
            for alternative in choice["logprobs"]["content"][0]["top_logprobs"]:
                word = alternative["token"].strip(" \u2581\u0120").lower()  # how tokenizers write a leading space
                if word in probabilities:
                    probabilities[word] += math.exp(alternative["logprob"])
        except (LookupError, TypeError, AttributeError):
            raise ValueError("the server returned no top_logprobs") from None
        total = sum(probabilities.values())
        if total < 0.5:
            raise ValueError(f"expected one of {', '.join(DEQA_LEVELS)}, got {choice['message']['content']!r}")
        return Scores(torch.tensor([sum(DEQA_LEVELS[word] * p for word, p in probabilities.items()) / total / 5]))


def _message_part(pixels: torch.Tensor, size: int | None) -> dict[str, Any]:
    """The part of a message that holds an image uint8 (3, H, W), resized to `size` x `size` unless that is None."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if size is not None:
        image = image.resize((size, size))
    png = io.BytesIO()
    image.save(png, format="PNG")
    data_url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": data_url}}


def _user(images: list[dict[str, Any]], text: str) -> dict[str, Any]:
    """A user's message: images, then a text."""
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def _written_score(pattern: str, choice: dict[str, Any]) -> Scores:
    """Find the number from 1 to 5 in the answer's text, and divide it by 5; ValueError if there is none."""
    text = choice["message"]["content"]
    match = re.search(pattern, text)
    if match is None or not 1 <= float(match[1]) <= 5:
        raise ValueError(f"no score from 1 to 5 in the answer that ends in {text[-200:]!r}")
    return Scores(torch.tensor([float(match[1]) / 5]))
