"""The supported model families."""

from collections.abc import Mapping
from typing import Any

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.flux import FluxPolicy
from fastflowgrpo.policy.flux2 import Flux2KleinPolicy, Flux2Policy
from fastflowgrpo.policy.flux_kontext import FluxKontextPolicy
from fastflowgrpo.policy.qwen_image import QwenImagePolicy
from fastflowgrpo.policy.qwen_image_edit import QwenImageEditPlusPolicy, QwenImageEditPolicy
from fastflowgrpo.policy.sd3 import SD3Policy
from fastflowgrpo.policy.wan import WanPolicy
from fastflowgrpo.policy.wan_image_to_video import WanImageToVideoPolicy
from fastflowgrpo.policy.z_image import ZImagePolicy

FAMILIES: dict[str, type[DiffusersPolicy]] = {
    "StableDiffusion3Pipeline": SD3Policy,
    "FluxPipeline": FluxPolicy,
    "FluxKontextPipeline": FluxKontextPolicy,
    "QwenImagePipeline": QwenImagePolicy,
    "QwenImageEditPipeline": QwenImageEditPolicy,
    "QwenImageEditPlusPipeline": QwenImageEditPlusPolicy,
    "WanPipeline": WanPolicy,
    "WanImageToVideoPipeline": WanImageToVideoPolicy,
    "ZImagePipeline": ZImagePolicy,
    "Flux2Pipeline": Flux2Policy,
    "Flux2KleinPipeline": Flux2KleinPolicy,
}
"""The class of each family, by the name of its diffusers pipeline."""


def pipeline_of(model: str, index: Mapping[str, Any], config: PolicyConfig) -> str:
    """Return the name of the diffusers pipeline that loads a model.

    Args:
        model: for the error message.
        index: the model's model_index.json.
        config: whether Wan 2.2 TI2V-5B makes videos from images.

    Raises:
        UserError: it does not, but `policy.image_to_video` is set.
    """
    name: str = index["_class_name"]
    if not config.image_to_video or name == "WanImageToVideoPipeline":
        return name
    if name != "WanPipeline" or not index.get("expand_timesteps"):
        raise UserError(f'policy.image_to_video: is for Wan 2.2 TI2V-5B, and "{model}" is another {name}: leave it out')
    return "WanImageToVideoPipeline"


def family_of(model: str, pipeline: str) -> type[DiffusersPolicy]:
    """Return the class of a model's family.

    Args:
        model: for the error message.
        pipeline: name of the model's diffusers pipeline.

    Raises:
        UserError: the family is not supported.
    """
    if pipeline not in FAMILIES:
        raise UserError(
            f'model "{model}" is a {pipeline}; supported: {", ".join(FAMILIES)}. '
            "docs/models.md says how to add a family"
        )
    return FAMILIES[pipeline]
