"""The stochastic sampler in a plain diffusers pipeline, with the log-prob of every step it took.

Any pipeline with a `FlowMatchEulerDiscreteScheduler` will do. The bundled one draws coloured shapes; it needs no
download.
"""

import torch
from diffusers import StableDiffusion3Pipeline

from fastflowgrpo import FlowSDEScheduler
from fastflowgrpo.shapes import PIPELINE

PROMPT = "a photo of a red circle left of a blue square"

pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE, text_encoder_3=None, tokenizer_3=None)
pipe.set_progress_bar_config(disable=True)
settings = {"num_inference_steps": 10, "guidance_scale": 1.0, "max_sequence_length": 0, "num_images_per_prompt": 4}


def draw(output_type="pil"):
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type=output_type, **settings).images


original = draw("np")

# Without noise the images are the original ones, bit for bit.
pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, noise_level=0.0)
print("noise level 0: same images:", (draw("np") == original).all())

# With noise the marginals stay the same, and each step has a Gaussian log-prob: what policy gradients need.
pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, noise_level=0.7)
images = draw()
steps = pipe.scheduler.trajectory
print("latents", tuple(steps.latents.shape), "timesteps", tuple(steps.timesteps.shape))
for timestep, log_probs in zip(steps.timesteps, steps.log_probs, strict=True):
    print(f"t = {timestep:6.1f}   log-prob of each image: ", "  ".join(f"{value:+.3f}" for value in log_probs))
images[0].resize((240, 240)).save("sampler.png")
print("saved sampler.png")
