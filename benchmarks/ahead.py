"""How much of the scoring hides behind rollout and update together: `python -m benchmarks.ahead`.

Whole epochs of the bundled model are trained with a reward that only waits, as if for another GPU: half, once and twice
as long as rollout and update take, without `rollout.ahead` and with it. The best possible is the longer of the two.
Without the setting nothing is scored during the update, and nothing is computed while the last scores are awaited.
"""

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.overlap import trainer
from fastflowgrpo.config import RolloutConfig
from fastflowgrpo.rewards import RewardBatch
from fastflowgrpo.trainer import Trainer

REWARD = "benchmarks.ahead:slow_brightness"
SHARES = (0.5, 1.0, 2.0)  # of the scoring, in the time of rollout and update


def slow_brightness(batch: RewardBatch, seconds: float) -> torch.Tensor:
    """Score the mean of an image after waiting for `seconds` per image."""
    time.sleep(seconds * len(batch.prompts))
    return batch.images.float().mean((1, 2, 3)) / 255


class Epochs:
    """Trains epochs of one trainer, some at a time.

    Args:
        made: the trainer.
    """

    def __init__(self, made: Trainer):
        self.made, self.epoch = made, 0

    def seconds(self, count: int) -> float:
        """Measure the seconds of an epoch, the mean of so many after one that is not measured."""
        self._train(1)
        begin = time.perf_counter()
        self._train(count)
        taken = (time.perf_counter() - begin) / count
        with self.made.scoring.set_aside():  # the next trainer that is measured shall be alone
            return taken

    def _train(self, count: int) -> None:
        for _ in range(count):
            self.made.learner.update(self.made.collect(self.epoch)[0])
            self.epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=24, help="groups of 24 images per epoch, each a batch")
    parser.add_argument("--ahead", type=int, default=16, help="groups that are sampled ahead")
    parser.add_argument("--epochs", type=int, default=2, help="epochs that are measured at a time, after another one")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each case, alternating")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    images = arguments.groups * RolloutConfig.group_size
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result: dict[str, Any] = {"device": device, "torch": torch.__version__, "groups": arguments.groups, "cases": []}
    print(f"{device}, torch {torch.__version__}, {arguments.groups} batches")
    with ExitStack() as stack:

        def epochs(seconds: float, ahead: int) -> Epochs:
            rewards = {REWARD: {"workers": 1, "seconds": seconds}}
            return Epochs(stack.enter_context(trainer(arguments.groups, rewards, ahead)))

        alone = epochs(0.0, 0)
        usual = alone.seconds(arguments.epochs)
        for share in SHARES:
            scoring = share * usual
            both = {ahead: epochs(scoring / images, ahead) for ahead in (0, arguments.ahead)}
            taken: dict[int, list[float]] = {ahead: [] for ahead in both}
            for _ in range(arguments.repeats):
                longer = max(scoring, alone.seconds(arguments.epochs))
                for ahead, of_ahead in both.items():
                    taken[ahead].append(of_ahead.seconds(arguments.epochs) / longer)
            for ahead, ratios in taken.items():
                ratio = statistics.median(ratios)
                case = {"scoring": share, "ahead": ahead, "ratio": ratio, "ratios": ratios}
                result["cases"].append(case)
                print(f"scoring {share:g} x (rollout + update), {ahead:2} ahead: {ratio:.3f} x the longer", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
