"""HPSv3 (arXiv 2508.03789): Qwen2-VL reads the image and the prompt, and a small head rates the image."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards.clip import Preprocess
from fastflowgrpo.rewards.models import (
    below,
    choose_device,
    choose_dtype,
    load_strictly,
    pretrained,
    read_weights,
    weights_file,
)
from fastflowgrpo.scoring.contract import RewardBatch, Scores

PIXELS = 256 * 28 * 28  # of an image as the network sees it
REWARD_TOKEN = "<|Reward|>"  # the head rates the hidden state of this token
# Qwen2-VL's chat template around the authors' question. The spaces at the ends of lines are theirs.
QUESTION = """<|im_start|>system
You are a helpful assistant.<|im_end|>
<|im_start|>user
<|vision_start|>{image}<|vision_end|>
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score \
to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the best. \n
**Visual Quality:**  \nEvaluate the overall visual quality of the image. The following sub-dimensions should be \
considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body \
structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, \
with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., \
hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, \
atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult \
material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n
**Text Alignment:**  \nAssess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with \
the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image \
adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically \
fit the scenario described in the prompt. The environment should support and enhance the subject without contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, \
expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical \
attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The \
generated content should not introduce elements that conflict with or distort the original description.
Textual prompt - {prompt}



Please provide the overall ratings of this image: <|Reward|>

END
<|im_end|>
<|im_start|>assistant
"""
# From the names of the published weights, by the version of transformers that saved them, to those of Qwen2VLModel.
NAMES = ((r"^visual\.", "model.visual."), (r"^model\.(?!visual\.|language_model\.)", "model.language_model."))


class HPSv3:
    """HPSv3: the published weights, loaded into the Qwen2-VL of transformers.

    The network returns the mean and the logarithm of the standard deviation of people's rating. The score is the mean,
    which has no fixed range; higher is better. The standard deviation is the detail `sigma`.

    Images are resized to about 256 x 28 x 28 pixels. Tokens have their place in the text as position, those of the
    image too, as in the authors' code, which does not use Qwen2-VL's positions of rows and columns.

    Args:
        model: hub id or local folder with the configuration and the tokenizer of the Qwen2-VL that was trained.
        weights: the published file: a local one, or hub_owner/repository/file.
        device: by default the GPU if there is one.
        dtype: of the network; the head computes in float32.
        batch_size: images per forward pass.

    Raises:
        ValueError: weights cannot be loaded, or a setting is wrong.
    """

    pointwise = True

    def __init__(
        self,
        model: str = "Qwen/Qwen2-VL-7B-Instruct",
        weights: str = "MizzenAI/HPSv3/HPSv3.safetensors",
        device: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 8,
    ) -> None:
        from transformers import AutoTokenizer, Qwen2VLConfig

        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device, self.batch_size = choose_device(device), batch_size
        self.tokenizer = pretrained(AutoTokenizer, model, padding_side="right")
        self.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        state: dict[str, torch.Tensor] = read_weights(weights_file(weights))
        try:
            self.network = _network(state, pretrained(Qwen2VLConfig, model), choose_dtype(dtype)).to(self.device)
            self.head = _head(state).to(self.device)
        except (ValueError, RuntimeError, KeyError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{weights!r} does not hold HPSv3's weights for {model!r}: {reason}") from error

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise a ValueError that names the prompt if one holds a token that has a meaning for the network."""
        for prompt in prompts:
            for token in self.tokenizer.get_added_vocab():
                if token in prompt.text:
                    raise ValueError(f"prompt {prompt.text!r}: it holds {token}, which the network takes for its own")

    @torch.inference_mode()
    def __call__(self, batch: RewardBatch) -> Scores:
        ratings = []
        for start in range(0, len(batch.prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            ratings.append(self._rate(batch.images[part].to(self.device), batch.prompts[part]))
        mean, log_sigma = torch.cat(ratings).cpu().unbind(-1)
        return Scores(mean, {"sigma": log_sigma.exp()})

    def _rate(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return mean and log sigma, float32 (B, 2)."""
        vision = self.network.config.vision_config
        height, width = images.shape[-2:]
        size = resized(height, width, vision.patch_size * vision.spatial_merge_size)
        pixels = Preprocess(size, None)(images).to(self.network.dtype)
        patches, grid = patchify(pixels, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        placeholders = "<|image_pad|>" * (int(grid[0].prod()) // vision.spatial_merge_size**2)
        texts = [QUESTION.format(image=placeholders, prompt=prompt) for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        hidden = self.network(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            position_ids=torch.arange(tokens.input_ids.shape[1], device=self.device).expand(3, len(prompts), -1),
            pixel_values=patches,
            image_grid_thw=grid,
            use_cache=False,
        ).last_hidden_state
        rated = tokens.input_ids == self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        return self.head(hidden[rated].float())


def resized(height: int, width: int, factor: int) -> tuple[int, int]:
    """Return the height and width that an image is resized to: multiples of `factor` with about PIXELS pixels."""
    rounded = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if rounded[0] * rounded[1] > PIXELS:
        shrink = math.sqrt(height * width / PIXELS)
        return math.floor(height / shrink / factor) * factor, math.floor(width / shrink / factor) * factor
    if rounded[0] * rounded[1] < PIXELS:
        enlarge = math.sqrt(PIXELS / (height * width))
        return math.ceil(height * enlarge / factor) * factor, math.ceil(width * enlarge / factor) * factor
    return rounded


def patchify(pixels: torch.Tensor, patch: int, merge: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut images into the patches that Qwen2-VL's vision transformer takes.

    Args:
        pixels: (B, 3, H, W), with H and W multiples of patch * merge.
        patch: side of a patch in pixels.
        merge: side in patches of the squares that become one token; their patches follow one another.
        frames: of a patch; an image is repeated as often.

    Returns:
        Patches (B * H/patch * W/patch, 3 * frames * patch * patch), and the grid of each image, int64 (B, 3): frames,
        rows and columns of patches.
    """
    count, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(count, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :].expand(*[-1] * 6, frames, -1, -1)
    grid = torch.tensor([[1, rows, columns]], device=pixels.device).expand(count, -1)
    return blocks.reshape(count * rows * columns, channels * frames * patch * patch), grid


def _network(state: dict[str, torch.Tensor], config: Any, dtype: torch.dtype) -> Any:
    """Make the Qwen2-VL without its language head; its vocabulary has the size of the published one."""
    from transformers import Qwen2VLModel

    for pattern, name in NAMES:
        state = {re.sub(pattern, name, key): weight for key, weight in state.items()}
    body = below(state, "model.")
    config.text_config.vocab_size = len(body["language_model.embed_tokens.weight"])
    network, report = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=body, dtype=dtype, output_loading_info=True
    )
    if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise ValueError(f"{len(wrong)} weights are missing or superfluous, the first is {wrong[0]}")
    return network.eval().requires_grad_(False)


def _head(state: dict[str, torch.Tensor]) -> nn.Module:
    """Make the head from hidden states to mean and log sigma; between its layers dropout was trained."""
    sizes = [state[f"rm_head.{layer}.weight"].shape[::-1] for layer in (0, 3, 5)]
    first, second, last = (nn.Linear(*size) for size in sizes)
    head = nn.Sequential(first, nn.ReLU(), nn.Dropout(), second, nn.ReLU(), last)
    load_strictly(head, {name: weight.float() for name, weight in below(state, "rm_head.").items()})
    return head
