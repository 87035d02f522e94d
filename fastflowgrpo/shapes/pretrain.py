"""Train the bundled shapes pipeline from scratch: `python -m fastflowgrpo.shapes.pretrain --output DIR`.

The command trains a VAE, then a flow-matching transformer together with its text encoders, in a quarter of an hour. The
second stage stops early, and some of its captions are wrong, both on purpose: the base model draws good objects but is
unsure of counts, positions and colour binding, as SD3.5-M is. An interrupted run continues from its last checkpoint.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTokenizer

from fastflowgrpo.shapes.modules import build_text_encoder, build_transformer, build_vae
from fastflowgrpo.shapes.scenes import COLORS, GRID, SHAPES, Shape, caption_prompts, render, sample_scene
from fastflowgrpo.shapes.tokenizer import MAX_LENGTH, build_tokenizer

# How often each tag is drawn, while the layout is learned and afterwards. The model learns relations late and all at
# once, and only from many captions at high noise; later training does not undo them.
LAYOUT_SHARES = {"single_object": 1, "two_object": 1, "counting": 1.5, "colors": 1, "position": 5, "color_attr": 1}
SHARES = {"single_object": 1, "two_object": 1, "counting": 1, "colors": 1.5, "position": 0.7, "color_attr": 3}
# After the layout phase, how often a caption of the tag gets the scene of another caption.
WRONG_CAPTIONS = {"two_object": 0.4, "position": 0.4}
SCENES = 32768
VAE_STEPS, VAE_BATCH, VAE_LEARNING_RATE = 2000, 32, 2e-3
# The code of a cell in the VAE's 8 channels: the corner of a tetrahedron for the colour (3), one for the shape (3) and
# the offset in pixels (2); all 0 for an empty cell. LATENT_STD is the posterior's standard deviation.
CORNERS = ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
LATENT_STD = 0.25
FLOW_STEPS, FLOW_BATCH, FLOW_LEARNING_RATE = 1000, 256, 1.5e-3
FLOW_SCHEDULE = 1800  # steps in which the learning rate would fall to its end
LAYOUT_STEPS = 700
LAYOUT_LOGIT_MEAN, LOGIT_MEAN, LOGIT_STD = 1.2, 0.5, 1.2  # sigma is logit-normal
CAPTION_DROPOUT = 0.1
# By default the SD3 pipeline without T5 appends 256 zero tokens. After the layout phase every fourth step has them, so
# that the model works with and without them.
ZERO_TOKENS, ZERO_TOKENS_FROM, ZERO_TOKENS_EVERY, ZERO_TOKENS_BATCH = 256, 800, 4, 32
CHECKPOINT_EVERY = 100


def captioned_scenes(
    count: int, shares: dict[str, float], wrong: dict[str, float], seed: int
) -> tuple[list[str], list[list[Shape]]]:
    """Draw captions and scenes.

    Args:
        count: number of captions.
        shares: relative frequency of each tag.
        wrong: for some tags the share of captions whose scene fulfils another caption of the tag.
        seed: of the draws.
    """
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
    """Draw scenes of 0 to 9 shapes, from which the VAE learns faster than from scenes with few shapes."""
    rng = np.random.default_rng(seed)
    return [
        sample_scene({"include": [{"class": str(c), "count": 1} for c in rng.choice(SHAPES, rng.integers(10))]}, rng)
        for _ in range(count)
    ]


def cell_codes(scenes: list[list[Shape]]) -> Tensor:
    """Return the latents that the VAE has to learn for scenes: (N, 8, 3, 3)."""
    codes = torch.zeros(len(scenes), 8, GRID, GRID)
    colors = list(COLORS)
    for i, scene in enumerate(scenes):
        for s in scene:
            code = (*CORNERS[colors.index(s.color)], *CORNERS[SHAPES.index(s.shape)], s.dx, s.dy)
            codes[i, :, s.row, s.column] = torch.tensor(code)
    return codes


def to_pixels(images: np.ndarray) -> Tensor:
    """Convert images, uint8 (N, H, W, 3), to the VAE's input, float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


class Training:
    """Trains the modules of one stage by AdamW with warm-up, cosine decay and an EMA, with checkpoints.

    Args:
        name: of the stage and its checkpoint.
        modules: that are trained; at the end they have the averaged weights.
        steps: to train.
        schedule: steps of the cosine decay.
        learning_rate: after the warm-up.
        ema: decay of the average.
        folder: of the checkpoint; training continues from the one that is there.
    """

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
        """Yield a random generator for each step that is left, seeded by the step, and write checkpoints in between."""
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
        """Take one optimizer step."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.ema.step(self.modules.parameters())


def train_vae(scenes: list[list[Shape]], seed: int, folder: Path) -> AutoencoderKL:
    """Train the encoder to give the codes of the cells, and the decoder to draw images of noisy codes."""
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
    """Set the VAE's shift and scale, and return the scaled mean and standard deviation of each scene's latents."""
    posteriors = [vae.encode(to_pixels(render(scenes[i : i + 512]))).latent_dist for i in range(0, len(scenes), 512)]
    mean, std = torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])
    shift = mean.mean().item()
    scale = ((mean - shift).square() + std.square()).mean().rsqrt().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (mean - shift) * scale, std * scale


def encode_tokens(modules: nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings and pooled embeddings of token ids (B, MAX_LENGTH), as the SD3 pipeline computes them."""
    encoded = [modules[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    embeds = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
    return embeds, torch.cat([output.text_embeds for output in encoded], dim=-1)


def train_flow(vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, folder: Path) -> nn.ModuleDict:
    """Train the transformer and its text encoders together by flow matching."""
    layout = captioned_scenes(SCENES, LAYOUT_SHARES, {}, seed)
    later = captioned_scenes(SCENES, SHARES, WRONG_CAPTIONS, seed)
    captions = layout[0] + later[0]
    mean, std = encode_scenes(vae, layout[1] + later[1])
    torch.manual_seed(seed)
    modules = nn.ModuleDict(
        {
            "transformer": build_transformer(),
            "text_encoder": build_text_encoder(tokenizer),
            "text_encoder_2": build_text_encoder(tokenizer),
        }
    )
    training = Training("flow", modules, FLOW_STEPS, FLOW_SCHEDULE, FLOW_LEARNING_RATE, 0.998, folder)

    padding = {"padding": "max_length", "max_length": MAX_LENGTH, "return_tensors": "pt"}
    tokens, empty = tokenizer(captions, **padding).input_ids, tokenizer([""], **padding).input_ids[0]
    for generator in training.remaining(seed + 1):
        with_zeros = training.step >= ZERO_TOKENS_FROM and training.step % ZERO_TOKENS_EVERY == 0
        batch = ZERO_TOKENS_BATCH if with_zeros else FLOW_BATCH
        is_layout = training.step < LAYOUT_STEPS
        rows = torch.randint(SCENES, (batch,), generator=generator) + (0 if is_layout else SCENES)
        dropped = torch.rand(batch, 1, generator=generator) < CAPTION_DROPOUT
        ids = torch.where(dropped, empty, tokens[rows])
        embeds, pooled = encode_tokens(modules, ids)
        embeds = F.pad(embeds, (0, 0, 0, ZERO_TOKENS if with_zeros else 0))
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
        "--output", type=Path, required=True, help="folder of the pipeline; checkpoints go into OUTPUT-training"
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
    vae.half()  # halves its size in the package; loading casts it to the dtype that is asked for
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
