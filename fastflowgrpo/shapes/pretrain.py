"""Train the bundled shapes pipeline from nothing: `python -m fastflowgrpo.shapes.pretrain --output DIR`.

A VAE, then a flow-matching transformer with its text encoders: a quarter of an hour. The flow is stopped early on
purpose, and some of its captions are wrong, so that the base model draws good objects but is unsure of counts,
positions and colour binding, as SD3.5-M is. An interrupted run continues where its last checkpoint stands.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from fastflowgrpo.shapes.scenes import COLORS, GRID, SHAPES, SIZE, Shape, caption_prompts, render, sample_scene
from fastflowgrpo.shapes.tokenizer import MAX_LENGTH, build_tokenizer

# How often each tag is a caption's: while the layout is learned, and then. Relations are learned late and all at once,
# and only where they are many and the noise is high; what comes after them does not undo them.
LAYOUT_SHARES = {"single_object": 1, "two_object": 1, "counting": 1.5, "colors": 1, "position": 5, "color_attr": 1}
SHARES = {"single_object": 1, "two_object": 1, "counting": 1, "colors": 1.5, "position": 0.7, "color_attr": 3}
# After the layout, how often a caption of the tag comes with the scene of another one.
WRONG_CAPTIONS = {"two_object": 0.4, "position": 0.4}
SCENES = 32768
VAE_STEPS, VAE_BATCH, VAE_LEARNING_RATE = 2000, 32, 2e-3
# The code of a cell, in the VAE's 8 channels: a tetrahedron's corner for the colour, one for the shape, the offset in
# pixels; 0 for an empty cell. The posterior's standard deviation around it is LATENT_STD.
CORNERS = ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
LATENT_STD = 0.25
FLOW_STEPS, FLOW_BATCH, FLOW_LEARNING_RATE = 1000, 256, 1.5e-3
FLOW_SCHEDULE = 1800  # the learning rate falls as if for so many steps
LAYOUT_STEPS = 700
LAYOUT_LOGIT_MEAN, LOGIT_MEAN, LOGIT_STD = 1.2, 0.5, 1.2  # of the logit of sigma
CAPTION_DROPOUT = 0.1
POSITION_NORM = 3.0
# The SD3 pipeline without T5 appends 256 zero tokens unless told otherwise. So that both work, every fourth step sees
# them once the layout is learned.
ZERO_TOKENS, ZERO_TOKENS_FROM, ZERO_TOKENS_EVERY, ZERO_TOKENS_BATCH = 256, 800, 4, 32
CHECKPOINT_EVERY = 100


def captioned_scenes(
    count: int, shares: dict[str, float], wrong: dict[str, float], seed: int
) -> tuple[list[str], list[list[Shape]]]:
    """Captions, their tags in these shares, and scenes that fulfil them or, in these shares of a tag, another caption
    of it."""
    rng = np.random.default_rng(seed)
    captions = caption_prompts()
    share = np.array(list(shares.values()))
    texts, scenes = [], []
    for tag in rng.choice(list(shares), count, p=share / share.sum()):
        prompt = captions[tag][rng.integers(len(captions[tag]))]
        texts.append(prompt.text)
        if wrong and rng.random() < wrong.get(tag, 0):
            prompt = captions[tag][rng.integers(len(captions[tag]))]
        scenes.append(sample_scene(prompt.metadata, rng))
    return texts, scenes


def crowded_scenes(count: int, seed: int) -> list[list[Shape]]:
    """Scenes of 0 to 9 shapes, from which the VAE learns faster than from sparse ones."""
    rng = np.random.default_rng(seed)
    return [
        sample_scene({"include": [{"class": str(c), "count": 1} for c in rng.choice(SHAPES, rng.integers(10))]}, rng)
        for _ in range(count)
    ]


def cell_codes(scenes: list[list[Shape]]) -> Tensor:
    """The latents that the VAE is to give these scenes: (N, 8, 3, 3)."""
    codes = torch.zeros(len(scenes), 8, GRID, GRID)
    colors = list(COLORS)
    for i, scene in enumerate(scenes):
        for s in scene:
            code = (*CORNERS[colors.index(s.color)], *CORNERS[SHAPES.index(s.shape)], s.dx, s.dy)
            codes[i, :, s.row, s.column] = torch.tensor(code)
    return codes


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-1, 1], what the VAE takes."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_vae() -> AutoencoderKL:
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


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
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
    # The sinusoids of a 3 x 3 grid hardly differ from cell to cell; orthogonal codes of its rows and columns do.
    codes = POSITION_NORM * torch.linalg.qr(torch.randn(width, 2 * GRID)).Q.T
    transformer.pos_embed.pos_embed.copy_((codes[:GRID, None] + codes[None, GRID:]).reshape(1, GRID * GRID, width))
    # Zero modulation and output: every block starts as the identity (arXiv 2212.09748).
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (".norm1" in name or "norm_out" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


class Training:
    """One stage: its modules, AdamW with warm-up and cosine decay, EMA, and a checkpoint to continue from."""

    def __init__(
        self,
        name: str,
        modules: nn.ModuleDict,
        steps: int,
        schedule: int,
        learning_rate: float,
        ema: float,
        folder: Path,
    ):
        self.name, self.modules, self.steps, self.path = name, modules, steps, folder / f"{name}.pt"
        self.optimizer = torch.optim.AdamW(
            modules.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda i: min(1.0, (i + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / schedule))),
        )
        self.ema = EMAModel(modules.parameters(), decay=ema)
        self.parts = {"modules": modules, "optimizer": self.optimizer, "schedule": self.schedule, "ema": self.ema}
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.step = state.pop("step")
            for key, part in self.parts.items():
                part.load_state_dict(state[key])

    def remaining(self, seed: int) -> Iterator[torch.Generator]:
        """A generator for each step left, a function of the step alone."""
        for step in tqdm(range(self.step, self.steps), self.name, initial=self.step, total=self.steps, mininterval=5):
            yield torch.Generator().manual_seed(seed * 1_000_003 + step)
            self.step = step + 1
            if self.step % CHECKPOINT_EVERY == 0 or self.step == self.steps:
                state = {key: part.state_dict() for key, part in self.parts.items()}
                torch.save({"step": self.step, **state}, self.path.with_suffix(".tmp"))
                self.path.with_suffix(".tmp").replace(self.path)
        self.ema.copy_to(self.modules.parameters())
        self.modules.eval().requires_grad_(False)

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.ema.step(self.modules.parameters())


def train_vae(scenes: list[list[Shape]], seed: int, folder: Path) -> AutoencoderKL:
    """The encoder learns the codes of the cells, the decoder to draw noisy ones."""
    images, codes = render(scenes), cell_codes(scenes)
    vae = build_vae().to(memory_format=torch.channels_last)  # faster on the CPU
    training = Training("vae", nn.ModuleDict({"vae": vae}), VAE_STEPS, VAE_STEPS, VAE_LEARNING_RATE, 0.999, folder)
    for generator in training.remaining(seed):
        rows = torch.randint(len(images), (VAE_BATCH,), generator=generator)
        pixels, code = to_pixels(images[rows.numpy()]), codes[rows]
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(code + LATENT_STD * torch.randn(code.shape, generator=generator)).sample
        encoder_loss = F.mse_loss(posterior.mean, code) + (posterior.logvar - 2 * math.log(LATENT_STD)).square().mean()
        training.update(encoder_loss + F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels))
    return vae


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, scenes: list[list[Shape]]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each scene's latents, by the shift and scale that they give the VAE."""
    posteriors = [vae.encode(to_pixels(render(scenes[i : i + 512]))).latent_dist for i in range(0, len(scenes), 512)]
    mean, std = torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])
    shift = mean.mean().item()
    scale = ((mean - shift).square() + std.square()).mean().rsqrt().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (mean - shift) * scale, std * scale


def train_flow(vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, folder: Path) -> nn.ModuleDict:
    """The transformer and its text encoders together, by flow matching."""
    layout = captioned_scenes(SCENES, LAYOUT_SHARES, {}, seed)
    then = captioned_scenes(SCENES, SHARES, WRONG_CAPTIONS, seed)
    captions = layout[0] + then[0]
    mean, std = encode_scenes(vae, layout[1] + then[1])
    torch.manual_seed(seed)
    modules = nn.ModuleDict(
        {
            "transformer": build_transformer(),
            "text_encoder": build_text_encoder(tokenizer),
            "text_encoder_2": build_text_encoder(tokenizer),
        }
    )
    training = Training("flow", modules, FLOW_STEPS, FLOW_SCHEDULE, FLOW_LEARNING_RATE, 0.998, folder)

    def tokenize(texts: list[str]) -> Tensor:
        return tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids

    tokens, empty = tokenize(captions), tokenize([""])[0]
    for generator in training.remaining(seed + 1):
        with_zeros = training.step >= ZERO_TOKENS_FROM and training.step % ZERO_TOKENS_EVERY == 0
        batch = ZERO_TOKENS_BATCH if with_zeros else FLOW_BATCH
        is_layout = training.step < LAYOUT_STEPS
        rows = torch.randint(SCENES, (batch,), generator=generator) + (0 if is_layout else SCENES)
        dropped = torch.rand(batch, 1, generator=generator) < CAPTION_DROPOUT
        ids = torch.where(dropped, empty, tokens[rows])
        encoded = [modules[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
        embeds = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
        embeds = F.pad(embeds, (0, 0, 0, ZERO_TOKENS if with_zeros else 0))
        pooled = torch.cat([output.text_embeds for output in encoded], dim=-1)
        clean = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        logit_mean = LAYOUT_LOGIT_MEAN if is_layout else LOGIT_MEAN
        sigma = torch.sigmoid(logit_mean + LOGIT_STD * torch.randn(batch, generator=generator))
        mix = sigma[:, None, None, None]
        velocity = modules["transformer"](
            (1 - mix) * clean + mix * noise,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
        training.update(F.mse_loss(velocity, noise - clean))
    return modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the pipeline; checkpoints in DIR-training"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.output.with_name(arguments.output.name + "-training")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    start = time.perf_counter()

    seed = arguments.seed
    vae = train_vae(crowded_scenes(SCENES // 8, seed), seed, folder)
    tokenizer = build_tokenizer([prompt.text for prompts in caption_prompts().values() for prompt in prompts])
    modules = train_flow(vae, tokenizer, seed + 3, folder)
    vae.half()  # half the bytes in the package; loading casts to the dtype that is asked for
    StableDiffusion3Pipeline(
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        text_encoder_3=None,
        **modules,
    ).save_pretrained(arguments.output)
    print(f"pipeline in {arguments.output}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
