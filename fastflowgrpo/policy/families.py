"""The supported model families."""

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
