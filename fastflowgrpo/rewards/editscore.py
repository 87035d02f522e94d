"""EditScore: a judge of edits that sees the source and the result."""

import re
from dataclasses import replace
from typing import Any

import torch

from fastflowgrpo.errors import UserError
from fastflowgrpo.rewards.judges import Judge
from fastflowgrpo.scoring.contract import RewardBatch, Scores

RANGE = 25  # of the numbers in an answer
TASK = """You are a professional digital artist. You will have to evaluate the effectiveness of the AI-generated \
image(s) based on given rules.
All the input images are AI-generated. All human in the images are AI-generated too. so you need not worry about the \
privacy confidentials.

IMPORTANT: You will have to give your output in this way (Keep your reasoning concise and short.):
{
"reasoning" : "...",
"score" : [...]
}

RULES:

"""
EDIT = (
    TASK
    + """Two images will be provided: The first being the original AI-generated image and the second being an edited \
version of the first.
The objective is to evaluate how successfully the editing instruction has been executed in the second image.

Note that sometimes the two images might look identical due to the failure of image edit.


From scale 0 to 25: \n\
A score from 0 to 25 will be given based on the success of the editing. (0 indicates that the scene in the edited \
image does not follow the editing instruction at all. 25 indicates that the scene in the edited image follow the \
editing instruction text perfectly.)
A second score from 0 to 25 will rate the degree of overediting in the second image. (0 indicates that the scene in \
the edited image is completely different from the original. 25 indicates that the edited image can be recognized as a \
minimal edited yet effective version of original.)
Put the score in a list such that output score = [score1, score2], where 'score1' evaluates the editing success and \
'score2' evaluates the degree of overediting.

Editing instruction: <instruction>
"""
)
QUALITY = (
    TASK
    + """The image is an AI-generated image.
The objective is to evaluate how successfully the image has been generated.

From scale 0 to 25: \n\
A score from 0 to 25 will be given based on image naturalness. \n\
(
    0 indicates that the scene in the image does not look natural at all or give a unnatural feeling such as wrong \
sense of distance, or wrong shadow, or wrong lighting. \n\
    25 indicates that the image looks natural.
)
A second score from 0 to 25 will rate the image artifacts. \n\
(
    0 indicates that the image contains a large portion of distortion, or watermark, or scratches, or blurred faces, \
or unusual body parts, or subjects not harmonized. \n\
    25 indicates the image has no artifacts.
)
Put the score in a list such that output score = [naturalness, artifacts]
"""
)
# What the two numbers of an answer rate.
EDIT_DETAILS = {"first": "instruction", "second": "consistency"}
QUALITY_DETAILS = {"first": "naturalness", "second": "artifacts"}
ANSWER = re.compile(r'"score"\s*:\s*\[\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*\]')


class EditScore(Judge):
    """EditScore (arXiv 2509.23909): was the instruction followed, did all else stay, and does the result look real?

    As in VIEScore (arXiv 2312.14867), two questions are asked about each image. With source and result: how well the
    instruction was followed, and how little else was changed. With the result alone: naturalness and freedom from
    artifacts. The score is sqrt(min(first two) * min(last two)), each number divided by RANGE, so 0 to 1. The numbers
    are the details `instruction`, `consistency`, `naturalness` and `artifacts`. It is missing if one is.

    The questions are those of the authors' code, with its "<img1>: " before an image. That asks several times at
    temperature 0.7 and takes the mean, and guesses numbers that an answer lacks; here each question is asked once at
    temperature 0. Settings and errors: see `Judge`. Any model that takes two images can be asked.

    Raises:
        UserError: when called with images that have no sources.
    """

    model = "EditScore-7B"

    def request(self, images: list[dict[str, Any]], prompt: str) -> dict[str, Any]:
        question = EDIT.replace("<instruction>", prompt) if len(images) == 2 else QUALITY
        content: list[dict[str, Any]] = []
        for number, image in enumerate(images, start=1):
            content += [{"type": "text", "text": f"<img{number}>: "}, image]
        content.append({"type": "text", "text": question})
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 512}

    def parse(self, choice: dict[str, Any]) -> Scores:
        text = choice["message"]["content"]
        found = [tuple(map(float, pair)) for pair in ANSWER.findall(text)]
        if len(found) != 1 or max(found[0]) > RANGE:
            raise ValueError(f'no "score": [A, B] from 0 to {RANGE} in the answer that ends in {text[-200:]!r}')
        numbers = torch.tensor(found[0]) / RANGE
        return Scores(numbers.amin(0, keepdim=True), {"first": numbers[:1], "second": numbers[1:]})

    def _split(self, batch: RewardBatch) -> list[RewardBatch]:
        if batch.sources is None:
            raise UserError("there are no source images: it scores edits only")
        rows = [batch.rows(slice(row, row + 1)) for row in range(len(batch.prompts))]
        return [part for row in rows for part in (row, replace(row, sources=None))]

    def _join(self, answers: list[Scores]) -> Scores:
        edit, quality = Scores.cat(answers[::2]), Scores.cat(answers[1::2])
        details = {
            names.get(name, name): numbers
            for scores, names in ((edit, EDIT_DETAILS), (quality, QUALITY_DETAILS))
            for name, numbers in scores.details.items()
        }
        return Scores((edit.values * quality.values).sqrt(), details, edit.error or quality.error)
