r"""A reward server for VideoAlign's VideoReward (arXiv 2501.13918), which runs in an environment of its own.

It scores visual quality (VQ), motion quality (MQ) and text alignment (TA). Its code needs transformers 4.45 and cannot
share the environment of the training. In one with Python 3.11 and VideoAlign's requirements:

    git clone https://github.com/KwaiVGI/VideoAlign          # and its weights into VideoAlign/checkpoints
    pip install --no-deps fastflowgrpo && pip install fastapi prometheus-client python-multipart uvicorn psutil \
        "jsonargparse[signatures]" "urllib3>=2.5" opencv-python-headless
    cd examples && PYTHONPATH=../VideoAlign python -m fastflowgrpo.serve --max_request_mib 512 --rewards \
        '{"videoalign_reward:videoalign": {"checkpoints": "../VideoAlign/checkpoints", "fps": 16}}'

The run then scores all frames of its videos; Wan 2.1 makes 16 a second:

    python -m fastflowgrpo.train --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --rollout.num_frames 33 --reward_frames 33 \
        --rewards '{"videoalign_reward:videoalign": {"url": "http://127.0.0.1:18085", "videos": true}}' ...

VideoAlign itself was not run: the tests replace its class `VideoVLMRewardInference` by one that reads the files.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import cv2
import torch

from fastflowgrpo.rewards import RewardBatch, Scores


@functools.cache
def load(checkpoints: str) -> Any:
    """VideoAlign's model; `inference` is a module of its repository."""
    from inference import VideoVLMRewardInference

    return VideoVLMRewardInference(checkpoints, device="cuda:0", dtype=torch.bfloat16)


def videoalign(batch: RewardBatch, checkpoints: str = "VideoAlign/checkpoints", fps: float = 16.0) -> Scores:
    """VQ + MQ + TA, each standardised as the authors do.

    Args:
        batch: videos, uint8 (B, F, 3, H, W).
        checkpoints: folder of the weights.
        fps: frames of a second. With `reward_frames` below the model's number of frames, it is lower than the model's
            in the same proportion.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{i}.mp4")) for i in range(len(batch.images))]
        for path, frames in zip(paths, batch.images, strict=True):
            save_video(path, frames, fps)
        scores = load(checkpoints).reward(paths, batch.prompts, use_norm=True)
    details = {name: torch.tensor([score[name] for score in scores]) for name in ("VQ", "MQ", "TA")}
    return Scores(sum(details.values(), torch.zeros(len(paths))), details)


videoalign.videos = True  # all frames of a video at once
videoalign.pointwise = True


def save_video(path: str, frames: torch.Tensor, fps: float) -> None:
    """Save frames uint8 (F, 3, H, W) as MP4."""
    height, width = frames.shape[-2:]
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise RuntimeError(f"OpenCV cannot write {path} with {width} x {height} pixels")
    for frame in frames.permute(0, 2, 3, 1).flip(-1).contiguous().numpy():  # OpenCV wants BGR
        writer.write(frame)
    writer.release()
