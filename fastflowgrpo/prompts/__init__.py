"""Prompts: their files, the generators that make them, and the choice of an epoch's prompts. Encoding a prompt for a
model belongs to `policy`, judging an image by its prompt to `rewards`.
"""

from fastflowgrpo.prompts.epochs import epoch_prompts
from fastflowgrpo.prompts.files import check_metadata, load_prompts
from fastflowgrpo.prompts.prompt import RELATIONS, TAGS, Prompt

__all__ = ["RELATIONS", "TAGS", "Prompt", "check_metadata", "epoch_prompts", "load_prompts"]
