"""The JSON that the reward server reads and answers."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class ScoreRequest(BaseModel):
    """The field `request` of a score request; lists have an entry per image or video."""

    model_config = ConfigDict(extra="forbid")

    prompts: Annotated[list[str], Field(min_length=1)]
    metadata: list[dict[str, Any]] | None = None
    """Each prompt's GenEval metadata; by default {} for each."""
    group_ids: list[int] | None = None
    """Images of one group are scored in one batch; by default each image is its own group."""
    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """Height and width of raw images."""
    frames: Annotated[int, Field(ge=1)] | None = None
    """Of each video, whose frames are sent as images one after another; None for images."""
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds that the client waits for the scores."""


class ScoreAnswer(BaseModel):
    """Scores in the order of the images; null for an image that could not be scored, with the reason in `error`."""

    scores: list[float | None]
    details: dict[str, list[float | None]]
    error: str | None


class PromptToCheck(BaseModel):
    """A prompt that images are to be scored against."""

    model_config = ConfigDict(extra="forbid")

    text: str
    metadata: dict[str, Any] = {}


class Health(BaseModel):
    """The rewards that are served, and those that have been scoring one batch for longer than the timeout."""

    rewards: list[str]
    hanging: list[str]


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str
