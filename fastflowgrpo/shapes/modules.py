"""The untrained modules of the bundled pipeline."""

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from fastflowgrpo.shapes.scenes import GRID, SIZE

POSITION_NORM = 3.0


def build_vae() -> AutoencoderKL:
    """Build a VAE that encodes an image to 8 channels of 3 x 3 latents, one for each cell of the grid."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8, 16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def clip_config(tokenizer: CLIPTokenizer, width: int, num_layers: int) -> CLIPTextConfig:
    """Return the configuration of a small CLIP text encoder for a tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Build one of the two text encoders, of 3 layers and width 64."""
    return CLIPTextModelWithProjection(clip_config(tokenizer, width=64, num_layers=3))


def build_transformer() -> SD3Transformer2DModel:
    """Build the transformer, of 4 layers and width 96; untrained, its output is 0."""
    width = 96
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 16,
        patch_size=1,
        in_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=128,
        caption_projection_dim=width,
        pooled_projection_dim=128,
        out_channels=8,
        pos_embed_max_size=GRID,
        qk_norm="rms_norm",
    )
    # Sinusoids hardly differ between the cells of a 3 x 3 grid; orthogonal codes of rows and columns do.
    codes = POSITION_NORM * torch.linalg.qr(torch.randn(width, 2 * GRID)).Q.T
    transformer.pos_embed.pos_embed.copy_((codes[:GRID, None] + codes[None, GRID:]).reshape(1, GRID * GRID, width))
    # Zero modulation and output: every block is the identity at first (arXiv 2212.09748).
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (".norm1" in name or "norm_out" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer
