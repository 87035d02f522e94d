"""Rewards by a vision-language model behind an OpenAI-compatible server (vLLM, SGLang, ...)."""

import base64
import io
import json
import logging
import math
import os
import re
import urllib.request
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

import torch
from PIL import Image

from fastflowgrpo.rewards.contract import RewardBatch, Scores

log = logging.getLogger(__name__)

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


class Judge(ABC):
    """Asks the server about each image, several at a time. An image that gets no score is NaN, and 1 in the detail
    `failed`; the first reason is logged.

    Args:
        base_url: of the API, such as http://localhost:8000/v1; by default the class's.
        model: its name on the server; by default the class's.
        timeout: seconds to wait for the server.
        concurrency: requests at once.
        api_key_env: environment variable with the key, if the server wants one.

    Raises:
        ValueError: a setting is wrong, or the environment variable is not set.
    """

    pointwise = True
    base_url = "http://127.0.0.1:8000/v1"
    model = ""
    size: int | None = None  # side in pixels to which images are resized first

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        timeout: float = 120.0,
        concurrency: int = 32,
        api_key_env: str | None = None,
    ) -> None:
        self.base_url, self.model = base_url or self.base_url, model or self.model
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {self.base_url!r}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout}")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(f"the environment variable {api_key_env} is not set")
        self.timeout, self.concurrency, self.api_key_env = timeout, concurrency, api_key_env

    @abstractmethod
    def request(self, image: dict[str, Any], prompt: str) -> dict[str, Any]:
        """The fields of the request, but for the model; `image` is the part of a message that holds it."""

    @abstractmethod
    def parse(self, choice: dict[str, Any]) -> float:
        """The score in the answer; ValueError if there is none."""

    def __call__(self, batch: RewardBatch) -> Scores:
        images = [Image.fromarray(pixels) for pixels in batch.images.permute(0, 2, 3, 1).cpu().numpy()]
        with ThreadPoolExecutor(self.concurrency) as pool:
            answers = list(pool.map(self._score, images, batch.prompts))
        failures = [answer for answer in answers if isinstance(answer, Exception)]
        error = ""
        if failures:
            error = f"{self.base_url}: {failures[0]}"
            count = f"{len(failures)} of {len(answers)}"
            log.warning("%s: %s images have no score; the first because: %s", self.base_url, count, failures[0])
        values = torch.tensor([math.nan if isinstance(answer, Exception) else answer for answer in answers])
        return Scores(values, {"failed": values.isnan().float()}, error)

    def _score(self, image: Image.Image, prompt: str) -> float | Exception:
        """The score, or why there is none."""
        if self.size is not None:
            image = image.resize((self.size, self.size))
        png = io.BytesIO()
        image.save(png, format="PNG")
        data_url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        request = self.request({"type": "image_url", "image_url": {"url": data_url}}, prompt)
        key = os.environ[self.api_key_env] if self.api_key_env else None
        try:
            return self.parse(
                chat(self.base_url, {"model": self.model, "temperature": 0, **request}, self.timeout, key)
            )
        except (OSError, HTTPException, ValueError) as error:
            return error


class UnifiedReward(Judge):
    """UnifiedReward (arXiv 2503.05236) of image and prompt: the number after "Final Score:" / 5, so 0.2 to 1.

    The question is Flow-GRPO's, and as there the image is resized to 512 x 512 pixels.
    """

    base_url = "http://127.0.0.1:17140/v1"
    model = "UnifiedReward-7b-v1.5"
    size = 512

    def request(self, image: dict[str, Any], prompt: str) -> dict[str, Any]:
        return {"messages": [_user(image, UNIFIEDREWARD.format(prompt=prompt))]}

    def parse(self, choice: dict[str, Any]) -> float:
        return _written_score(r"Final Score:[\s*]*(\d+(?:\.\d+)?)", choice)


class QwenVL(Judge):
    """Aesthetic quality as Qwen2.5-VL (arXiv 2502.13923) sees it: the number in <Score> / 5, so 0.2 to 1.

    The question is Flow-GRPO's; the prompt plays no part.
    """

    model = "Qwen/Qwen2.5-VL-7B-Instruct"

    def request(self, image: dict[str, Any], prompt: str) -> dict[str, Any]:
        return {"messages": [_user(image, QWENVL)], "max_tokens": 2048}

    def parse(self, choice: dict[str, Any]) -> float:
        return _written_score(r"<Score>\s*(\d+(?:\.\d+)?)\s*</Score>", choice)


class DeQA(Judge):
    """DeQA-Score (arXiv 2501.11561), image quality: the expected level / 5, so 0.2 to 1. The prompt plays no part.

    The model goes on after "The quality of the image is"; the levels are excellent 5, good 4, fair 3, poor 2 and bad 1,
    with the probabilities that it gives these words, made to sum to 1. Of a word that is not among the 20 most likely,
    the probability is taken as 0. It is a failure if something else is more likely than the five words together.

    The server must continue a begun answer (`continue_final_message`, as vLLM does) and return `logprobs`.
    """

    model = "zhiyuanyou/DeQA-Score-Mix3"

    def request(self, image: dict[str, Any], prompt: str) -> dict[str, Any]:
        return {
            "messages": [_user(image, DEQA_QUESTION), {"role": "assistant", "content": DEQA_ANSWER}],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
        }

    def parse(self, choice: dict[str, Any]) -> float:
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
        return sum(DEQA_LEVELS[word] * p for word, p in probabilities.items()) / total / 5


def chat(base_url: str, request: dict[str, Any], timeout: float, key: str | None = None) -> dict[str, Any]:
    """Post a chat completion request, once.

    Args:
        base_url: of the API, such as http://localhost:8000/v1.
        request: its JSON fields.
        timeout: seconds to wait for the server to go on.
        key: bearer token.

    Returns:
        The first choice of the answer.

    Raises:
        OSError, http.client.HTTPException: there was no answer, or one with an error's status.
        ValueError: the answer is no chat completion.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    post = urllib.request.Request(f"{base_url.rstrip('/')}/chat/completions", json.dumps(request).encode(), headers)
    try:
        with urllib.request.urlopen(post, timeout=timeout) as response:
            answer = json.load(response)
    except HTTPError as error:
        with error:
            raise OSError(f"HTTP status {error.code}: {error.read()[:200].decode(errors='replace')}") from None
    try:
        choice = answer["choices"][0]
        if isinstance(choice["message"]["content"], str):
            return choice
    except (LookupError, TypeError):
        pass
    raise ValueError(f"expected a chat completion, got {str(answer)[:200]!r}")


def _user(image: dict[str, Any], text: str) -> dict[str, Any]:
    """The user's message: an image, then a text about it."""
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


def _written_score(pattern: str, choice: dict[str, Any]) -> float:
    """The number from 1 to 5 that the pattern finds in the answer's text, / 5."""
    text = choice["message"]["content"]
    match = re.search(pattern, text)
    if match is None or not 1 <= float(match[1]) <= 5:
        raise ValueError(f"no score from 1 to 5 in the answer that ends in {text[-200:]!r}")
    return float(match[1]) / 5
