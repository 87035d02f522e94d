"""Train a LoRA for two epochs, and load it into a plain diffusers pipeline, as its users will.

python load_lora.py [CHECKPOINT]     runs/NAME/checkpoints/checkpoint-STEP of the bundled model; without one it trains
"""

import sys

import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from fastflowgrpo import Config, Trainer
from fastflowgrpo.config import EvaluationConfig, PolicyConfig, PromptsConfig
from fastflowgrpo.runs.checkpoints import last_checkpoint
from fastflowgrpo.shapes import PIPELINE

PROMPTS = ["a photo of a green cross", "a photo of two red squares"]


def train():
    """The checkpoint of a short run."""
    config = Config(
        output_dir="runs/load_lora",
        overwrite=True,
        epochs=2,
        policy=PolicyConfig(lora_rank=16),
        prompts=PromptsConfig(per_epoch=6),
        evaluation=EvaluationConfig(every=0, num_steps=4, images_per_prompt=1),
        trackers=[],
    )
    config.rollout.batch_size = 144
    config.update.learning_rate = 2e-3
    Trainer(config).run()
    return last_checkpoint(config.output_dir)


def draw():
    """One image of each prompt, in a row."""
    settings = {"num_inference_steps": 20, "guidance_scale": 1.0, "max_sequence_length": 0}
    images = pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **settings).images
    row = Image.new("RGB", (192 * len(images), 192))
    for i, image in enumerate(images):
        row.paste(image.resize((192, 192)), (192 * i, 0))
    return row


checkpoint = sys.argv[1] if len(sys.argv) > 1 else train()
pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE, text_encoder_3=None, tokenizer_3=None)
pipe.set_progress_bar_config(disable=True)
before = draw()
pipe.load_lora_weights(checkpoint)
after = draw()

both = Image.new("RGB", (before.width, before.height + after.height))
both.paste(before)
both.paste(after, (0, before.height))
both.save("load_lora.png")
print("saved load_lora.png: before above, after below")
