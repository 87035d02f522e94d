"""Models under training: a `Policy` wraps a diffusers pipeline, one small file per model family.

Here are loading, LoRA adapters, prompt embeddings and the format of saved weights. How samples are drawn from a policy
is in `sampling`, how it is updated in `learning`, and what a run costs in `planning`.
"""

from fastflowgrpo.policy.families import FAMILIES, family_of, pipeline_of
from fastflowgrpo.policy.loading import component_dtypes, load_policy, with_default_rank
from fastflowgrpo.policy.protocol import Conditioning, Policy

__all__ = [
    "FAMILIES",
    "Conditioning",
    "Policy",
    "component_dtypes",
    "family_of",
    "load_policy",
    "pipeline_of",
    "with_default_rank",
]
