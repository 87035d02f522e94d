"""What decoding in another dtype changes in the bundled model's images: ``python -m benchmarks.vae_dtype``."""

import torch
from torch import Tensor

from fastflowgrpo import load_policy
from fastflowgrpo.config import Config, PolicyConfig
from fastflowgrpo.prompts.sources import run_prompts
from fastflowgrpo.rewards import RewardBatch, build_rewards
from fastflowgrpo.sampling.ode import sample_ode

IMAGES = 256


def main() -> None:
    """Print how pixels and scores differ from those of float32, for the same latents of evaluation prompts."""
    config = Config()
    prompts = run_prompts(config)[1]
    prompts = (prompts * IMAGES)[:IMAGES]
    texts, rewards = [prompt.text for prompt in prompts], build_rewards(config.rewards)
    policy = load_policy(config.model, config.policy)
    noise = torch.randn(IMAGES, *policy.latent_shape(None, None), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = sample_ode(policy, policy.encode(texts), 20, noise)

    def decoded(dtype: str, latents: Tensor) -> tuple[Tensor, Tensor]:
        images = load_policy(config.model, PolicyConfig(vae_dtype=dtype)).decode(latents)  # type: ignore[arg-type]
        batch = RewardBatch(images, texts, [prompt.metadata for prompt in prompts], torch.arange(IMAGES))
        return images.float(), rewards(batch).values

    images, scores = decoded("float32", latents)
    for name, dtype, changed in (
        ("bfloat16", "bfloat16", latents),
        ("float16", "float16", latents),
        ("latents in bfloat16", "float32", latents.bfloat16()),
    ):
        other_images, other_scores = decoded(dtype, changed)
        difference = (other_images - images).abs()
        psnr = 10 * torch.log10(255**2 / difference.square().mean())
        print(
            f"{name}: {(difference > 0).float().mean():.1%} of the values change, by {difference.mean():.3f} of 255 in "
            f"the mean and {difference.max():.0f} at most, PSNR {psnr:.1f} dB; "
            f"{int((other_scores != scores).sum())} of {IMAGES} scores change"
        )


if __name__ == "__main__":
    main()
