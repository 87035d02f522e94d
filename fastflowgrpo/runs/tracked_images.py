"""Images with captions in the experiment trackers."""

from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator
from PIL import Image

from fastflowgrpo.evaluation.pictures import captioned

MAX_IMAGES = 12


def track_images(
    accelerator: Accelerator, images: Sequence[Image.Image], captions: Sequence[str], chosen: Sequence[int], step: int
) -> None:
    """Log some of the images of an evaluation to TensorBoard and W&B; other trackers get none.

    TensorBoard has no captions: there they are written under the images.

    Args:
        images, captions: of the evaluation's gallery.
        chosen: which of them may be logged; up to MAX_IMAGES of these are, evenly spaced.
        step: optimiser updates done.
    """
    some = [chosen[i * len(chosen) // MAX_IMAGES] for i in range(MAX_IMAGES)] if len(chosen) > MAX_IMAGES else chosen
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            for i in some:
                pixels = np.asarray(captioned(images[i], captions[i]))
                tracker.writer.add_image(f"gallery/{i}", pixels, global_step=step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            pictures = [wandb.Image(images[i], caption=captions[i]) for i in some]
            tracker.log({"gallery": pictures}, step=step)
