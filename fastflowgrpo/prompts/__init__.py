"""Prompts: reading them from files, making them, and choosing those of an epoch."""

from fastflowgrpo.prompts.epochs import epoch_prompts
from fastflowgrpo.prompts.files import check_metadata, load_prompts
from fastflowgrpo.prompts.prompt import RELATIONS, TAGS, Prompt

__all__ = ["RELATIONS", "TAGS", "Prompt", "check_metadata", "epoch_prompts", "load_prompts"]
