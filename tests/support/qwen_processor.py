"""Qwen2-VL's processor of texts and images, without its part for videos: that needs torchvision."""

from copy import copy

import transformers
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


class WithoutVideos(Qwen2VLProcessor):
    """What the pipelines use of the processor; saved and loaded under its name."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        super(Qwen2VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)


WithoutVideos.__name__, WithoutVideos.__module__ = Qwen2VLProcessor.__name__, Qwen2VLProcessor.__module__
transformers.Qwen2VLProcessor = WithoutVideos  # where diffusers looks for it


def tiny_qwen_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Return a processor with a tokenizer's copy that knows the tokens of images, for images of 28 n px a side."""
    tokenizer = copy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return WithoutVideos(image_processor=Qwen2VLImageProcessorPil(), tokenizer=tokenizer)
