"""``python -m fastflowgrpo.doctor [--SETTING VALUE ...]``: tries what a training run needs, before it starts
(docs/doctor.md).
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fastflowgrpo.config import Config, parse
from fastflowgrpo.console import print_error, run_and_exit
from fastflowgrpo.errors import UserError

if TYPE_CHECKING:
    from fastflowgrpo.trainer import Trainer

# Backends of diffusers that need no download; policy.attention takes its others too.
ATTENTION = ("native", "_native_flash", "_native_efficient", "_native_cudnn", "flash", "_flash_3", "xformers")


class Checkup:
    """Tries the parts of a run one after another, and prints a line for each finding.

    Args:
        config: of the run, validated.
    """

    def __init__(self, config: Config):
        self.config = config
        self.errors = 0

    def run(self) -> int:
        """Try everything that can be tried.

        Returns:
            How many parts do not work.
        """
        self.packages()
        self.memory()
        self.prompts_and_rewards()
        if self.errors:
            with self.trying("model"):
                self.model()
            self.say("skipped", "step", "until the errors above are corrected")
        else:
            self.step()
        return self.errors

    def say(self, status: str, part: str, text: str) -> None:
        """Print a finding: ok, note (what may be better), error or skipped."""
        self.errors += status == "error"
        print(f"{status:8} {part:10} {text}", flush=True)

    @contextmanager
    def trying(self, part: str) -> Iterator[None]:
        """Inside it, an error of any kind is a finding."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            self.say("error", part, text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")

    def packages(self) -> None:
        """The versions of the packages, and which operations are compiled."""
        import torch

        from fastflowgrpo.kernels.backend import HAS_TRITON
        from fastflowgrpo.results import versions

        self.say("ok", "packages", ", ".join(f"{name} {version}" for name, version in versions().items()))
        if find_spec("fastflowgrpo._native") is None:
            self.say("note", "extension", "is not built, so advantages are computed by torch: install a C++ compiler")
        if not torch.cuda.is_available():
            self.say("note", "device", "no GPU that torch can use: this trains on the CPU")
            return
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        self.say("ok", "device", f"{torch.cuda.get_device_name()}, compute capability {capability}")
        if not HAS_TRITON:
            self.say("note", "kernels", 'Triton is missing, so steps are not fused: pip install "fastflowgrpo[gpu]"')
        if self.config.policy.dtype == "float32":
            self.say("note", "dtype", "policy.dtype bfloat16 halves the frozen weights, and is faster")
        if not self.config.policy.compile and self.config.policy.quantization is None:
            self.say("note", "compile", "policy.compile makes epochs up to 1.6 times as fast, once it has compiled")

    def memory(self) -> None:
        """The dry run's estimate against what is free."""
        from fastflowgrpo.planning.memory import shortage
        from fastflowgrpo.planning.micro_batch import available_memory, with_largest_micro_batch

        with self.trying("memory"):
            if not self.config.update.batch_size:
                self.config = with_largest_micro_batch(self.config, 1, available_memory(self.config))
            short = shortage(self.config, 1)
            self.say("error" if short else "ok", "memory", short or "the estimate fits into what is free")

    def prompts_and_rewards(self) -> None:
        """Whether the prompts can be read, and the rewards be built and score them."""
        from fastflowgrpo.prompts.sources import run_prompts
        from fastflowgrpo.rewards import build_rewards

        prompts = []
        with self.trying("prompts"):
            train, evaluation = run_prompts(self.config)
            prompts = [*train, *evaluation]
            self.say("ok", "prompts", f"{len(train)} to train on, {len(evaluation)} to evaluate with")
        with self.trying("rewards"):
            build_rewards(self.config.rewards).check_prompts(prompts)
            self.say("ok", "rewards", ", ".join(self.config.rewards))

    def model(self) -> None:
        """Whether the model can be loaded."""
        import torch

        from fastflowgrpo.policy import load_policy

        device = "cuda" if torch.cuda.is_available() else "cpu"
        policy = load_policy(self.config.model, self.config.policy, device)
        trained = sum(parameter.numel() for parameter in policy.trainable_parameters())
        self.say("ok", "model", f"{self.config.model}: {type(policy).__name__}, {trained / 1e6:.2f} M trained")

    def step(self) -> None:
        """Load all as a run does, and train one batch of the rollout."""
        from fastflowgrpo.trainer import Trainer

        with tempfile.TemporaryDirectory() as folder, self.trying("step"):
            trainer = Trainer(one_batch(self.config, folder))
            with closing(trainer.lock):
                self.train(trainer)
                self.attention(trainer)

    def train(self, trainer: "Trainer") -> None:
        """Sample, score and train one batch, and say how long an epoch will take."""
        batch, metrics = trainer.collect(0)
        if missing := metrics["missing"]:
            self.say("note", "scores", f"{missing} of {metrics['images']} images have no score")
        if metrics["groups_without_spread"] == 1:
            self.say("note", "scores", "all images of each group are scored alike: there is nothing to learn from")
        if trainer.objective.uses_log_probs:
            with self.trying("replay"):
                trainer.check_replay(batch)
                self.say("ok", "replay", "the update computes the rollout's log-probs again: the first ratio is 1")
        with trainer.report.phase("update"):
            trainer.learner.update(batch)
        seconds = dict(trainer.report.seconds)
        phases = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        self.say("ok", "step", f"{metrics['images']} images; seconds: {phases}")
        share = self.config.prompts.per_epoch / trainer.config.prompts.per_epoch
        self.say("ok", "epoch", f"about {share * sum(seconds.values()):.3g} s in one process; the first step is slow")
        if seconds["score"] > 0.2 * sum(seconds.values()):
            self.say("note", "rewards", "the run waits for them: give them workers, or a server (docs/serving.md)")

    def attention(self, trainer: "Trainer") -> None:
        """Which backends of attention work, forward and backward."""
        from fastflowgrpo.policy.base import DiffusersPolicy

        policy, working = trainer.policy, []
        if not isinstance(policy, DiffusersPolicy):
            return
        for name in ATTENTION:
            try:
                policy.set_attention(name)
            except UserError:
                continue
            working.append(name)
        names = ", ".join(working) or "none beside the model's own"
        self.say("ok", "attention", f"policy.attention takes {names}")


def one_batch(config: Config, folder: str) -> Config:
    """A run of one epoch with one batch of the rollout, if the updates can share it, which writes only into `folder`.

    Args:
        config: of the whole run.
        folder: its run directory.
    """
    groups, updates = config.rollout.batch_size // config.rollout.group_size, config.update.per_epoch
    per_epoch = min(config.prompts.per_epoch, -(-groups // updates) * updates)
    return replace(
        config,
        output_dir=folder,
        resume=None,
        trackers=[],
        hub_model_id=None,
        prompts=replace(config.prompts, per_epoch=per_epoch),
        rollout=replace(config.rollout, ahead=0),
        evaluation=replace(config.evaluation, gallery=0),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Check the run that the command line describes.

    Args:
        argv: the command line without the program; None reads `sys.argv`.

    Returns:
        The exit code: 0, or 2 if a setting is wrong or a part does not work.
    """
    try:
        config = parse(argv, "doctor")
    except UserError as error:
        return print_error(error)
    errors = Checkup(config).run()
    if errors:
        print(
            f"{errors} part{'s' if errors > 1 else ''} of the run do{'' if errors > 1 else 'es'} not work",
            file=sys.stderr,
        )
    return 2 if errors else 0


if __name__ == "__main__":
    run_and_exit(main)
