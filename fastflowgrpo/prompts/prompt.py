"""A prompt, its metadata and its source images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, with what goes with it.

    Attributes:
        text: the prompt, or the instruction of an editing model.
        metadata: what rewards may use, such as GenEval's; {} for a plain text.
        image: the image that an editing model starts from, as a file or a file's contents; None for text-to-image.
        references: further images, for models that take several.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    image: Path | bytes | None = None
    references: tuple[Path | bytes, ...] = ()

    @property
    def images(self) -> tuple[Path | bytes, ...]:
        """The source images: `image` and the references; none for text-to-image."""
        return () if self.image is None else (self.image, *self.references)
