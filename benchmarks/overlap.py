"""How much of the scoring hides behind the rollout: `python -m benchmarks.overlap`.

An epoch of the bundled model is sampled with a reward that takes no time, and then with a reward that takes as long per
image as the rollout. This reward only waits, as if for another GPU; it runs in a worker process, and behind a reward
server. One after the other, rollout and scoring would take twice as long. The rollout of the first batch and the
scoring of the last one overlap with nothing, so with n batches the best is (n + 1) / n times the longer of the two.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.serve import server
from fastflowgrpo.config import Config, EvaluationConfig, PromptsConfig, RolloutConfig
from fastflowgrpo.trainer import Trainer

INSTANT, WAITING = "benchmarks.serve:instant", "benchmarks.serve:waiting"


@contextmanager
def trainer(groups: int, rewards: dict[str, Any], ahead: int = 0) -> Iterator[Trainer]:
    """Make a trainer that samples and scores one group at a time, and `ahead` groups before the update."""
    with TemporaryDirectory() as folder:
        made = Trainer(
            Config(
                output_dir=folder + "/run",
                trackers=[],
                prompts=PromptsConfig(per_epoch=groups),
                rollout=RolloutConfig(batch_size=RolloutConfig.group_size, ahead=ahead),
                rewards=rewards,
                evaluation=EvaluationConfig(images_per_prompt=1),
            )
        )
        try:
            yield made
        finally:
            made.accelerator.end_training()


def epoch(made: Trainer, number: int) -> float:
    """Measure the seconds of an epoch's rollout and scoring."""
    begin = time.perf_counter()
    made.collect(number)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=24, help="groups of 24 images per epoch")
    parser.add_argument("--repeats", type=int, default=5, help="measured epochs of each, alternating")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    groups, repeats = arguments.groups, arguments.repeats
    with ExitStack() as stack:
        made = {"rollout alone": stack.enter_context(trainer(groups, {INSTANT: 1.0}))}
        alone = [epoch(made["rollout alone"], i) for i in range(repeats)]
        per_image = statistics.median(alone[1:]) / (groups * RolloutConfig.group_size)
        waiting = {"seconds": per_image}
        url = stack.enter_context(server("--rewards", json.dumps({WAITING: waiting}), "--delay", "0"))
        made["worker process"] = stack.enter_context(trainer(groups, {WAITING: {"workers": 1, **waiting}}))
        made["server"] = stack.enter_context(trainer(groups, {WAITING: {"url": url, "concurrency": 1}}))
        taken: dict[str, list[float]] = {name: [] for name in made}
        for number in range(repeats + 1):
            for name, of_name in made.items():
                taken[name].append(epoch(of_name, number))
    seconds = {name: statistics.median(values[1:]) for name, values in taken.items()}  # the first warms up
    seconds["scoring alone"] = per_image * groups * RolloutConfig.group_size
    longer = max(seconds["rollout alone"], seconds["scoring alone"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}, {groups} batches")
    for name, value in seconds.items():
        print(f"{name:15} {value:.2f} s, {value / longer:.2f} times the longer of rollout and scoring alone")
    if arguments.output:
        result = {"device": device, "torch": torch.__version__, "groups": groups, "seconds": seconds}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
