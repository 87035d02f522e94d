"""Tiny diffusers pipelines with random weights, built in memory, with every component of the real ones."""

import json
from collections.abc import Iterable
from copy import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from support.qwen_processor import tiny_qwen_processor
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from fastflowgrpo.shapes.modules import clip_config

CLIP_LENGTH = 24
CLIP_WIDTH = 16
T5_WIDTH = 32
QWEN_WIDTH = 32
FLUX2_WIDTH = 16


class EulerOnUniPCsSigmas(FlowMatchEulerDiscreteScheduler):
    """What a Wan pipeline gets to be stepped through as it is in training."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(sigmas=np.linspace(1, 1e-3, num_inference_steps + 1)[:-1], device=device)


def perturb(parameters: Iterable[torch.nn.Parameter], scale: float = 0.05, seed: int = 1) -> None:
    """Add Gaussian noise to parameters in place, so that trained weights differ from the loaded ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def tiny_sd3_pipeline(seed: int = 0, *, t5: bool = True, **transformer: Any) -> StableDiffusion3Pipeline:
    """Return a StableDiffusion3Pipeline of 16 x 16 px images and 4 x 8 x 8 latents, with shift 3.

    Args:
        seed: of the weights.
        t5: whether it has T5.
        transformer: what distinguishes Stable Diffusion 3.5: qk_norm, and for Medium dual_attention_layers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_projection_dim=32,
                joint_attention_dim=T5_WIDTH,
                pooled_projection_dim=2 * CLIP_WIDTH,
                pos_embed_max_size=8,
                **transformer,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_clip(CLIPTextModelWithProjection),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(CLIPTextModelWithProjection),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5() if t5 else None,
            tokenizer_3=_t5_tokenizer() if t5 else None,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux_pipeline(seed: int = 0) -> FluxPipeline:
    """Return a FluxPipeline with FLUX.1-dev's scheduler and embedded guidance, 4 n px a side, 16 packed channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FluxPipeline(
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=T5_WIDTH,
                pooled_projection_dim=CLIP_WIDTH,
                guidance_embeds=True,
                axes_dims_rope=(4, 4, 8),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_vae(),
            text_encoder=_clip(CLIPTextModel),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(),
            tokenizer_2=_t5_tokenizer(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux_kontext_pipeline(seed: int = 0) -> FluxKontextPipeline:
    """Return a FluxKontextPipeline of the components of `tiny_flux_pipeline`."""
    pipe = FluxKontextPipeline(**tiny_flux_pipeline(seed).components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_qwen_image_pipeline(seed: int = 0, *, zero_cond_t: bool = False) -> QwenImagePipeline:
    """Return a QwenImagePipeline with Qwen-Image's scheduler, 4 n px a side, 16 packed channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = QwenImagePipeline(
            transformer=QwenImageTransformer2DModel(
                patch_size=2,
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=QWEN_WIDTH,
                axes_dims_rope=(4, 4, 8),
                zero_cond_t=zero_cond_t,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                max_image_seq_len=8192,
                shift_terminal=0.02,
            ),
            vae=AutoencoderKLQwenImage(**_VIDEO_VAE).eval(),
            text_encoder=_qwen(_qwen_tokenizer()),
            tokenizer=_qwen_tokenizer(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_qwen_image_edit_pipeline(seed: int = 0) -> QwenImageEditPipeline:
    """Return a QwenImageEditPipeline of the components of `tiny_qwen_image_pipeline`, and a processor."""
    return _with_processor(QwenImageEditPipeline, tiny_qwen_image_pipeline(seed))


def tiny_qwen_image_edit_plus_pipeline(seed: int = 0, *, zero_cond_t: bool = False) -> QwenImageEditPlusPipeline:
    """Return a QwenImageEditPlusPipeline of the same; with `zero_cond_t` as Qwen-Image-Edit-2511 is."""
    return _with_processor(QwenImageEditPlusPipeline, tiny_qwen_image_pipeline(seed, zero_cond_t=zero_cond_t))


def tiny_wan_pipeline(seed: int = 0, *, high_compression: bool = False) -> WanPipeline:
    """Return a WanPipeline with Wan 2.1's schedule (UniPC, flow_shift 3), 2 n + 1 frames, 16 n px a side.

    Args:
        seed: of the weights.
        high_compression: what distinguishes Wan 2.2 TI2V-5B: another VAE, and a timestep per token.
    """
    vae = _VIDEO_VAE | {"scale_factor_temporal": 2, "scale_factor_spatial": 2}
    if high_compression:
        vae |= {
            "is_residual": True,
            "dim_mult": [1, 1],
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "decoder_base_dim": 8,
        }
        vae["scale_factor_spatial"] = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = WanPipeline(
            expand_timesteps=high_compression,
            transformer=_wan_transformer(),
            scheduler=UniPCMultistepScheduler(
                flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction", num_train_timesteps=1000
            ),
            vae=AutoencoderKLWan(**vae).eval(),
            text_encoder=_umt5(),
            tokenizer=_t5_tokenizer(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_wan_experts_pipeline(seed: int = 0) -> WanPipeline:
    """Return a `tiny_wan_pipeline` with two transformers, of which the second has the noise levels below 0.8."""
    components = tiny_wan_pipeline(seed).components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        components["transformer_2"] = _wan_transformer()
    pipe = WanPipeline(**components, boundary_ratio=0.8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_wan_image_to_video_pipeline(kind: str = "wan21", seed: int = 0) -> WanImageToVideoPipeline:
    """Return a WanImageToVideoPipeline of the components of `tiny_wan_pipeline`.

    Args:
        kind: "wan21", with CLIP's tokens of the image and further channels; "experts", two transformers without CLIP,
            of which the second has the noise levels below 0.8; "wan22_5b", with the image as the first latent frame.
        seed: of the weights.
    """
    components = tiny_wan_pipeline(seed, high_compression=kind == "wan22_5b").components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "wan21":
            size = {"image_size": 16, "patch_size": 8}
            vision = CLIPVisionConfig(
                **size, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
            )
            components["image_encoder"] = CLIPVisionModel(vision).eval()
            components["image_processor"] = CLIPImageProcessor(
                size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
            )
        if kind != "wan22_5b":
            image = {"image_dim": 16, "added_kv_proj_dim": 24} if kind == "wan21" else {}
            components["transformer"] = _wan_transformer(in_channels=4 + 2 + 4, **image)
        if kind == "experts":
            components["transformer_2"] = _wan_transformer(in_channels=4 + 2 + 4)
    pipe = WanImageToVideoPipeline(
        **components, expand_timesteps=kind == "wan22_5b", boundary_ratio=0.8 if kind == "experts" else None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_z_image_pipeline(seed: int = 0) -> ZImagePipeline:
    """Return a ZImagePipeline with Z-Image-Turbo's schedule (shift 3), 4 n px a side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = ZImagePipeline(
            transformer=ZImageTransformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=QWEN_WIDTH,
                axes_dims=[4, 4, 8],
                axes_lens=[128, 64, 64],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=Qwen3Model(_qwen3_config(QWEN_WIDTH, num_layers=2)).eval(),
            tokenizer=_chat_tokenizer(),
        )
        # as zeros, padding would not matter
        perturb([pipe.transformer.x_pad_token, pipe.transformer.cap_pad_token], scale=0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux2_klein_pipeline(seed: int = 0, *, is_distilled: bool = False) -> Flux2KleinPipeline:
    """Return a Flux2KleinPipeline with FLUX.2's scheduler, 4 n px a side, 16 channels of a token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = Flux2KleinPipeline(
            transformer=_flux2_transformer(guidance_embeds=False),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_flux2_vae(),
            text_encoder=Qwen3ForCausalLM(_qwen3_config(FLUX2_WIDTH, num_layers=28)).eval(),
            tokenizer=_chat_tokenizer(),
            is_distilled=is_distilled,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux2_pipeline(seed: int = 0) -> Flux2Pipeline:
    """Return a Flux2Pipeline with an embedded guidance, and a plain tokenizer for the processor of its text encoder.

    The processor of the published pipeline needs torchvision. It tokenizes the text and adds nothing to it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = Flux2Pipeline(
            transformer=_flux2_transformer(guidance_embeds=True),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_flux2_vae(),
            text_encoder=_mistral(),
            tokenizer=_chat_tokenizer("[1]['content'][0]['text']"),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _wan_transformer(in_channels: int = 4, **image: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=T5_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **image,
    )


def _flux2_transformer(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * FLUX2_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def _flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        batch_norm_eps=0.1,  # large, to be seen
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


# for Wan's VAE and Qwen-Image's
_VIDEO_VAE = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "latents_mean": [0.1, -0.2, 0.3, -0.4],
    "latents_std": [1.5, 2.0, 0.8, 1.2],
}


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    # one token per byte, inside a word and at its end; no merges
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=CLIP_LENGTH
    )


def _clip(kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection]) -> torch.nn.Module:
    return kind(clip_config(_clip_tokenizer(), CLIP_WIDTH, num_layers=2)).eval()


def _t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*pieces, *((chr(code), -2.0) for code in range(33, 127))], extra_ids=0)


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(_t5_tokenizer()),
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=2 * T5_WIDTH,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def _umt5() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(_t5_tokenizer()), d_model=T5_WIDTH, d_kv=8, d_ff=2 * T5_WIDTH, num_layers=1, num_heads=4
    )
    return UMT5EncoderModel(config).eval()


@cache
def _qwen_tokenizer() -> Qwen2Tokenizer:
    """Each word of the template is one token, as for Qwen: the pipeline cuts off the first 34 tokens."""
    return _tokenizer_for(QwenImagePipeline(None, None, None, None, None).prompt_template_encode)


def _with_processor(kind, pipe: QwenImagePipeline):
    """A pipeline of a kind that edits images, with a tokenizer for its own template."""
    tokenizer = _tokenizer_for(kind(*[None] * 6).prompt_template_encode)
    parts = {**pipe.components, "tokenizer": tokenizer, "processor": tiny_qwen_processor(tokenizer)}
    parts["text_encoder"] = _qwen(parts["processor"].tokenizer)
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tokenizer_for(template: str) -> Qwen2Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([template], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def _chat_tokenizer(content: str = "[0]['content']") -> Qwen2Tokenizer:
    """A tokenizer whose chat template has the text of a message only, without those around it."""
    tokenizer = copy(_qwen_tokenizer())
    tokenizer.chat_template = "<|im_start|>{{ messages" + content + " }}<|im_end|>"
    return tokenizer


def _qwen3_config(width: int, num_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(_qwen_tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.2,
    )


def _mistral() -> Mistral3ForConditionalGeneration:
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(_qwen_tokenizer()),
            "hidden_size": FLUX2_WIDTH,
            "intermediate_size": 2 * FLUX2_WIDTH,
            "num_hidden_layers": 31,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "initializer_range": 0.2,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        },
    )
    return Mistral3ForConditionalGeneration(config).eval()


def _qwen(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    image, start = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>"])
    config = Qwen2_5_VLConfig(
        image_token_id=image,
        vision_start_token_id=start,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": QWEN_WIDTH,
            "intermediate_size": 2 * QWEN_WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": QWEN_WIDTH,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()
