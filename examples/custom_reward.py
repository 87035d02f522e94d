"""Two rewards of your own, and a short training run on both.

A pointwise reward sees each image alone; a groupwise one compares the images of a prompt. Settings name both as
`module:function`, so the command line can use them too, from this folder:

    python -m fastflowgrpo.train --rewards '{"custom_reward:redness": 1, "custom_reward:novelty": 0.5}'
"""

import torch

from fastflowgrpo import Config, Trainer
from fastflowgrpo.config import EvaluationConfig, PromptsConfig
from fastflowgrpo.rewards import RewardBatch


def redness(batch: RewardBatch) -> torch.Tensor:
    """How much redder than green and blue an image is, 0 to 1. NaN would mean that it could not be scored."""
    red, green, blue = batch.images.float().mean((2, 3)).unbind(1)
    return (red - (green + blue) / 2).clamp(min=0) / 255


redness.pointwise = True  # worker processes may share a group


def novelty(batch: RewardBatch) -> torch.Tensor:
    """The mean absolute distance of an image from the others of its group, 0 to 1."""
    pixels = batch.images.float().flatten(1) / 255
    scores = torch.empty(len(pixels))
    for group in batch.group_ids.unique():
        members = batch.group_ids == group
        others = torch.cdist(pixels[members], pixels[members], p=1) / pixels.shape[1]
        scores[members] = others.sum(1) / (len(others) - 1)
    return scores


if __name__ == "__main__":
    config = Config(
        output_dir="runs/custom_reward",
        overwrite=True,
        epochs=3,
        rewards={"custom_reward:redness": 1.0, "custom_reward:novelty": 0.5},
        prompts=PromptsConfig(per_epoch=6),
        evaluation=EvaluationConfig(every=0, num_steps=4, images_per_prompt=1),
        trackers=[],
    )
    config.rollout.batch_size = 144
    config.update.learning_rate = 1e-3
    trainer = Trainer(config)
    trainer.run()
    rewards = [row["reward"] for row in trainer.state.rows if "epoch" in row]
    print(f"reward of the first epoch {rewards[0]:.3f}, of the last {rewards[-1]:.3f}")
