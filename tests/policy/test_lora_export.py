"""LoRAs for ComfyUI and kohya's trainers: fixed keys, and the same images when diffusers' own converters load them."""

import io

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from support.pipelines import (
    perturb,
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_wan_image_to_video_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy import FAMILIES
from fastflowgrpo.policy.lora import ADAPTER, save_lora
from fastflowgrpo.policy.lora_export import Factors, comfyui, kohya, merge, read_lora
from fastflowgrpo.policy.sd3 import SD3Policy
from fastflowgrpo.policy.weights import LORA
from fastflowgrpo.sampling.ode import sample_ode

BUILD = {
    "sd3": (tiny_sd3_pipeline, {"height": 16, "width": 24}),
    "flux": (tiny_flux_pipeline, {"height": 16, "width": 24}),
    "qwen": (tiny_qwen_image_pipeline, {"height": 16, "width": 24}),
    "wan": (tiny_wan_pipeline, {"height": 16, "width": 32, "num_frames": 3}),
    "wan_i2v": (tiny_wan_image_to_video_pipeline, {"height": 16, "width": 32, "num_frames": 5}),
    "zimage": (tiny_z_image_pipeline, {"height": 16, "width": 24}),
    "klein": (tiny_flux2_klein_pipeline, {"height": 16, "width": 24}),
}
LAYOUTS = {"comfyui": comfyui, "kohya": kohya}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
WAN_CROSS = ("q", "k", "v", "o", "k_img", "v_img")
Z_BLOCKS = ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"]
FLUX2_DOUBLE = [f"{stream}_{name}" for stream in ("img", "txt") for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
LAYERS = {  # of the tiny pipelines' default LoRA
    ("sd3", "comfyui"): [
        *(f"transformer.transformer_blocks.0.attn.{name}" for name in ATTENTION),
        *(f"transformer.transformer_blocks.1.attn.{name}" for name in ATTENTION[:-1]),
    ],
    ("sd3", "kohya"): [
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        "lora_unet_joint_blocks_0_x_block_attn_proj",
        "lora_unet_joint_blocks_0_context_block_attn_qkv",
        "lora_unet_joint_blocks_0_context_block_attn_proj",
        "lora_unet_joint_blocks_1_x_block_attn_qkv",
        "lora_unet_joint_blocks_1_x_block_attn_proj",
        "lora_unet_joint_blocks_1_context_block_attn_qkv",
    ],
    ("flux", "comfyui"): [
        *(f"transformer.transformer_blocks.0.attn.{name}" for name in ATTENTION),
        *(f"transformer.transformer_blocks.0.{name}" for name in FEED_FORWARD),
        *(f"transformer.single_transformer_blocks.0.attn.{name}" for name in ATTENTION[:3]),
    ],
    ("flux", "kohya"): [
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_double_blocks_0_img_attn_proj",
        "lora_unet_double_blocks_0_img_mlp_0",
        "lora_unet_double_blocks_0_img_mlp_2",
        "lora_unet_double_blocks_0_txt_attn_qkv",
        "lora_unet_double_blocks_0_txt_attn_proj",
        "lora_unet_double_blocks_0_txt_mlp_0",
        "lora_unet_double_blocks_0_txt_mlp_2",
        "lora_unet_single_blocks_0_linear1",
    ],
    ("qwen", "comfyui"): [f"diffusion_model.transformer_blocks.{i}.attn.{name}" for i in (0, 1) for name in ATTENTION],
    ("qwen", "kohya"): [
        f"lora_unet_transformer_blocks_{i}_attn_{name.replace('.', '_')}" for i in (0, 1) for name in ATTENTION
    ],
    ("wan", "comfyui"): [
        f"diffusion_model.blocks.{i}.{block}_attn.{name}"
        for i in (0, 1)
        for block in ("self", "cross")
        for name in "qkvo"
    ],
    ("wan", "kohya"): [
        f"lora_unet_blocks_{i}_{block}_attn_{name}" for i in (0, 1) for block in ("self", "cross") for name in "qkvo"
    ],
    ("wan_i2v", "comfyui"): [
        f"diffusion_model.blocks.{i}.{name}"
        for i in (0, 1)
        for name in (*(f"self_attn.{part}" for part in "qkvo"), *(f"cross_attn.{part}" for part in WAN_CROSS))
    ],
    ("wan_i2v", "kohya"): [
        f"lora_unet_blocks_{i}_{name}"
        for i in (0, 1)
        for name in (*(f"self_attn_{part}" for part in "qkvo"), *(f"cross_attn_{part}" for part in WAN_CROSS))
    ],
    ("zimage", "comfyui"): [f"transformer.{block}.attention.{name}" for block in Z_BLOCKS for name in ATTENTION[:4]],
    ("zimage", "kohya"): [
        f"lora_unet_{block}_attention_{name}".replace(".", "_") for block in Z_BLOCKS for name in ATTENTION[:4]
    ],
    ("klein", "comfyui"): [
        *(f"diffusion_model.double_blocks.0.{name}" for name in FLUX2_DOUBLE),
        "diffusion_model.single_blocks.0.linear1",
    ],
    ("klein", "kohya"): [
        *(f"lora_unet_double_blocks_0_{name.replace('.', '_')}" for name in FLUX2_DOUBLE),
        "lora_unet_single_blocks_0_linear1",
    ],
}
SUFFIXES = {
    "comfyui": ("lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight", "alpha"),
}
# What diffusers' converter for musubi-tuner's Wan asks for, and what its converter for sd-scripts' FLUX takes of a tiny
# model: it knows the width of the single blocks, 3072, and no other.
TARGETS = {
    ("wan", "kohya"): ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
    ("wan_i2v", "kohya"): [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_k_proj",
        "add_v_proj",
        "ffn.net.0.proj",
        "ffn.net.2",
    ],
    ("flux", "kohya"): ["transformer_blocks.0.attn.to_q", "to_out.0", "add_k_proj", "add_v_proj", *FEED_FORWARD],
}


def perturbed_pipeline(name):
    """A tiny pipeline whose images depend on its transformer enough to see a LoRA."""
    pipeline = BUILD[name][0]()
    perturb(pipeline.transformer.parameters(), scale=0.2)
    return pipeline


def trained(name, tmp_path, targets=None):
    """A policy with a LoRA whose scale is 2.5, and the LoRA in its saved file."""
    pipeline = perturbed_pipeline(name)
    length = 512 if name == "wan_i2v" else 12
    config = PolicyConfig(lora_rank=4, lora_alpha=10, lora_targets=targets, max_sequence_length=length)
    policy = FAMILIES[type(pipeline).__name__](pipeline, config)
    perturb(policy.trainable_parameters(), scale=0.3)
    policy.save(tmp_path)
    return policy, read_lora(tmp_path / LORA)


def images(policy, name):
    noise = torch.randn(1, *policy.latent_shape(**BUILD[name][1]), generator=torch.Generator().manual_seed(3))
    if policy.edits_images:
        source = io.BytesIO()
        Image.new("RGB", (32, 16), "red").save(source, "png")
        conditioning = policy.encode_edit("a cat", [source.getvalue()], noise.shape[1:])
    else:
        conditioning = policy.encode(["a cat"])
    return policy.decode(sample_ode(policy, conditioning, 3, noise))


def difference(first, second):
    """The largest one, in steps of uint8."""
    return (first.int() - second.int()).abs().max()


@pytest.mark.parametrize(("name", "form"), LAYERS)
def test_keys(tmp_path, name, form):
    policy, lora = trained(name, tmp_path)
    tensors = LAYOUTS[form](type(policy.pipeline).__name__, lora)
    assert sorted(tensors) == sorted(f"{layer}.{suffix}" for layer in LAYERS[name, form] for suffix in SUFFIXES[form])


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in LAYERS if (name, form) != ("sd3", "kohya")])
def test_diffusers_loads_it_and_draws_the_runs_images(tmp_path, name, form):
    policy, lora = trained(name, tmp_path, TARGETS.get((name, form)))
    expected = images(policy, name)
    with policy.reference():
        assert difference(images(policy, name), expected) > 20
    save_file(LAYOUTS[form](type(policy.pipeline).__name__, lora), tmp_path / "exported.safetensors")
    pipeline = perturbed_pipeline(name)
    pipeline.load_lora_weights(tmp_path / "exported.safetensors")
    policy.transformer = pipeline.transformer
    assert difference(images(policy, name), expected) <= 1


@pytest.mark.parametrize("layout", LAYOUTS.values())
@pytest.mark.parametrize(
    ("editing", "base"),
    [
        ("FluxKontextPipeline", "FluxPipeline"),
        ("QwenImageEditPipeline", "QwenImagePipeline"),
        ("QwenImageEditPlusPipeline", "QwenImagePipeline"),
    ],
)
def test_editing_models_have_the_layout_of_their_base(layout, editing, base):
    lora = random_lora({"transformer_blocks.0.attn.to_q": (8, 8), "transformer_blocks.0.attn.add_v_proj": (8, 8)})
    tensors = layout(base, lora)
    assert all(torch.equal(tensor, tensors.pop(name)) for name, tensor in layout(editing, lora).items())
    assert not tensors


def random_lora(shapes):
    generator = torch.Generator().manual_seed(4)
    return {
        name: Factors(torch.randn(3, inputs, generator=generator), torch.randn(outputs, 3, generator=generator))
        for name, (outputs, inputs) in shapes.items()
    }


def test_diffusers_reads_kohyas_flux_in_the_published_width():
    single, wide = "single_transformer_blocks.5", "transformer_blocks.7.attn.to_q"
    shapes = {f"{single}.attn.to_{part}": (3072, 3072) for part in "qkv"}
    shapes |= {f"{single}.proj_mlp": (12288, 3072), f"{single}.proj_out": (3072, 15360), wide: (3072, 3072)}
    for left_out in ((), (f"{single}.proj_mlp",), (f"{single}.attn.to_q", f"{single}.attn.to_k")):
        lora = random_lora({name: shape for name, shape in shapes.items() if name not in left_out})
        read = FluxPipeline.lora_state_dict(kohya("FluxPipeline", lora))
        for name, (down, up) in lora.items():
            x = torch.randn(down.shape[1])
            theirs = read[f"transformer.{name}.lora_B.weight"] @ (read[f"transformer.{name}.lora_A.weight"] @ x)
            torch.testing.assert_close(theirs, up @ (down @ x), rtol=1e-4, atol=1e-3)
        for name in left_out:
            assert not read[f"transformer.{name}.lora_B.weight"].any()


class Checkpoint(dict):
    """A checkpoint in the original layout that is zero where nothing was set."""

    def __missing__(self, key):
        return torch.zeros(12, 12)

    def pop(self, key):
        return super().pop(key, self[key])


def test_kohyas_sd3_has_the_layout_that_diffusers_converts_from():
    """sd-scripts adds `up @ down * alpha / rank` to the layers of the original model."""
    block = "transformer_blocks.0"
    names = [f"{block}.attn.{name}" for name in ATTENTION] + [f"{block}.attn2.{name}" for name in ATTENTION[:4]]
    shapes = dict.fromkeys(names, (8, 8))
    shapes |= {f"{block}.ff{stream}.net.0.proj": (32, 8) for stream in ("", "_context")}
    shapes |= {f"{block}.ff{stream}.net.2": (8, 32) for stream in ("", "_context")}
    lora = random_lora(shapes)
    tensors = kohya("StableDiffusion3Pipeline", lora)
    original = Checkpoint(
        {"joint_blocks.1": torch.zeros(0), "joint_blocks.0.x_block.attn2.ln_q.weight": torch.zeros(8)}
    )
    for layer in ["attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2"]:
        for stream in ("x_block", "context_block"):
            key = f"lora_unet_joint_blocks_0_{stream}_{layer.replace('.', '_')}"
            if layer.startswith("attn2") and stream == "context_block":
                continue
            down, up = tensors.pop(f"{key}.lora_down.weight"), tensors.pop(f"{key}.lora_up.weight")
            scale = tensors.pop(f"{key}.alpha") / len(down)
            original[f"joint_blocks.0.{stream}.{layer}.weight"] = scale * up @ down
    assert not tensors
    converted = convert_sd3_transformer_checkpoint_to_diffusers(original)
    for name, (down, up) in lora.items():
        torch.testing.assert_close(converted[f"{name}.weight"], up @ down)


def test_merged_weights_have_every_layers_own_scale(tmp_path):
    pipeline = perturbed_pipeline("sd3")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"transformer_blocks.0.attn.to_q": 2},
        alpha_pattern={"attn.to_k": 3},
        target_modules=["attn.to_q", "attn.to_k", "attn.to_v"],
        init_lora_weights=False,  # random instead of zero
    )
    pipeline.transformer.add_adapter(config, adapter_name=ADAPTER)
    save_lora(pipeline, tmp_path)
    policy = SD3Policy(perturbed_pipeline("sd3"), PolicyConfig(lora=str(tmp_path), max_sequence_length=12))
    expected = images(policy, "sd3")
    policy.transformer = perturbed_pipeline("sd3").transformer
    assert difference(images(policy, "sd3"), expected) > 5
    merge(policy.transformer, read_lora(tmp_path / LORA))
    assert difference(images(policy, "sd3"), expected) <= 1


def test_what_is_refused(tmp_path):
    lora = random_lora({"transformer_blocks.0.norm1.linear": (48, 8), "proj_out": (8, 8)})
    with pytest.raises(UserError, match=r"--format kohya has no place for transformer_blocks\.0\.norm1\.linear"):
        kohya("FluxPipeline", lora)
    with pytest.raises(UserError, match=r"--format comfyui has no place for proj_out"):
        comfyui("WanPipeline", {"proj_out": lora["proj_out"]})
    for layout in LAYOUTS.values():
        with pytest.raises(UserError, match=r"is made for StableDiffusion3Pipeline, .* not for a SanaPipeline"):
            layout("SanaPipeline", lora)
    with pytest.raises(UserError, match=r"fits another model: .* has no transformer_blocks\.0\.norm1\.linear of shape"):
        merge(tiny_sd3_pipeline().transformer, lora)
    save_file(
        {"transformer.x.lora_magnitude_vector": torch.ones(2)},
        tmp_path / LORA,
        {"lora_adapter_metadata": "{}"},
    )
    with pytest.raises(UserError, match=r"transformer\.x\.lora_magnitude_vector is no LoRA of a linear layer"):
        read_lora(tmp_path / LORA)
