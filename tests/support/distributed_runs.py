"""What test_distributed.py has several processes do, and does itself in one."""

import importlib
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from support import killed_run

from fastflowgrpo import Config, Trainer
from fastflowgrpo.config import EvaluationConfig, PolicyConfig, PromptsConfig, RolloutConfig, UpdateConfig
from fastflowgrpo.distributed import full_tensor
from fastflowgrpo.errors import UserError
from fastflowgrpo.rewards import RewardBatch, Scores

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
PROMPTS = ["a cat", "two dogs", "a red ball", "the sea", "a cat on a ball", "snow"]
SIZE = 4  # of a group


def place_reward(batch: RewardBatch) -> Scores:
    """Of the prompt and the place in the group alone, so that any number of processes gives the same scores: a group of
    equal ones, and one score missing."""
    place = torch.arange(len(batch.prompts)) - torch.searchsorted(batch.group_ids, batch.group_ids)
    length = torch.tensor([float(len(prompt)) for prompt in batch.prompts])
    values = torch.sin(length + 3 * place)
    values[[prompt == "snow" for prompt in batch.prompts]] = 0.25
    values[(length == len("two dogs")) & (place == 1)] = torch.nan
    return Scores(values, {"length": length})


def redness(batch: RewardBatch) -> torch.Tensor:
    """A guard that sees the images."""
    return batch.images[:, 0].float().mean((1, 2)) / 255


def deadly(batch: RewardBatch, mark: str, epoch: int) -> torch.Tensor:
    """Draws from all global random numbers, and kills rank 1 once, in a given epoch: it is called once for the first
    evaluation and twice an epoch."""
    deadly.calls += 1
    if os.environ.get("RANK") == "1" and deadly.calls > 1 + 2 * epoch and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return killed_run.noisy(batch)


deadly.calls = 0


def config_of(
    folder: Path,
    output: Path,
    *,
    updates: int = 2,
    rank: int = 4,
    dtype: str = "float32",
    evaluated: int = 5,
    algorithm: str = "grpo",
    ahead: int = 0,
) -> Config:
    config = Config(
        model=str(folder),
        output_dir=str(output),
        trackers=["tensorboard"],
        policy=PolicyConfig(dtype=dtype, lora_rank=rank, lora_alpha=8, max_sequence_length=8),
        prompts=PromptsConfig(train=str(folder / "prompts.txt"), eval=str(folder / f"{evaluated}.txt"), per_epoch=6),
        rollout=RolloutConfig(
            guidance_scale=2.0,
            group_size=SIZE,
            num_steps=5,
            window_size=2,
            window_start=(0, 3),
            batch_size=2 * SIZE,
            ahead=ahead,
        ),
        update=UpdateConfig(
            per_epoch=updates, batch_size=5, learning_rate=3.0, kl_weight=0.1, ema_decay=0.9, ema_every=1
        ),
        rewards={"support.distributed_runs:place_reward": 1},
        max_missing=0.05,  # one of 24 images is missing, but of 12 on one of two processes
        evaluation=EvaluationConfig(
            num_steps=3, images_per_prompt=2, batch_size=4, guard="support.distributed_runs:redness"
        ),
    )
    if rank == 0:
        config.rollout.same_noise, config.rollout.tail_steps = True, 1
    if algorithm == "nft":
        explored = {"candidates": 9, "candidate_steps": 2}
        config.rollout = RolloutConfig(dynamics="ode", group_size=SIZE, num_steps=5, batch_size=2 * SIZE, **explored)
        config.update = replace(config.update, algorithm="nft", noise_draws=2, old_decay_slope=0.1)
    return config


def z_image_config(folder: Path, output: Path) -> Config:
    """Z-Image, whose transformer takes lists and not tensors."""
    config = config_of(folder / "z_image", output)
    config.rollout.height = config.rollout.width = 16
    return config


def train(config: Config, resumes: bool = False) -> dict:
    """Two epochs as `Trainer.run` has them, and what this process sees of them.

    With `resumes` there is a third epoch, by this trainer and by one that resumes its run.
    """
    trainer = Trainer(config)
    # Adam divides by the gradient's own size and would blow up the rounding of the smallest.
    trainer.learner.optimizer.param_groups[0]["eps"] = 1.0
    before = [full_tensor(parameter.detach()).clone() for parameter in trainer.learner.parameters]
    seen = {"latents": {}, "pairs": [], "passes": []}
    trainer.evaluate()
    for epoch in range(2):
        batch, metrics = trainer.collect(epoch)
        for i, group in enumerate(trainer.processes.rank_indices(config.prompts.per_epoch)):
            seen["latents"][epoch, group] = batch.trajectory.final[i * SIZE : (i + 1) * SIZE]
        if epoch == 0 and trainer.objective.uses_log_probs:
            trainer.check_replay(batch)
        calls = []
        hook = trainer.policy.module.register_forward_hook(
            lambda m, i, output, calls=calls: calls.append(len(output[0]))
        )
        metrics |= trainer.learner.update(batch)
        hook.remove()
        seen["passes"].append(len(calls))
        trainer.report.epoch(epoch, trainer.learner.step, metrics)
    trainer.evaluate()
    trainer.state.epoch, trainer.state.ahead = 2, trainer.epoch_sampler.ahead
    trainer.state.mark_epoch_boundary()
    trainer.state.save()
    after = [full_tensor(parameter.detach()).clone() for parameter in trainer.learner.parameters]
    seen["change"] = torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)])
    average = [full_tensor(parameter) for parameter in trainer.learner.ema.shadow_params]
    seen["average"] = torch.cat([(b - a).flatten() for a, b in zip(before, average, strict=True)])
    if trainer.learner.old_policy is not None:
        old = [full_tensor(value) for value in trainer.learner.old_policy.values]
        seen["average"] = torch.cat([seen["average"], *((b - a).flatten() for a, b in zip(before, old, strict=True))])
    if resumes:
        seen["gone on"] = torch.cat([next_epoch(trainer), next_epoch(Trainer(replace(config, resume="latest")))], 1)
    seen["sharded"] = sum(
        full_tensor(p).numel() > getattr(p, "_local_tensor", p).numel() for p in trainer.learner.parameters
    )
    return seen


def next_epoch(trainer: Trainer) -> torch.Tensor:
    """The weights and their average after one more epoch."""
    trainer.learner.optimizer.param_groups[0]["eps"] = 1.0
    trainer.learner.update(trainer.collect(trainer.state.epoch)[0])
    tensors = [*trainer.learner.parameters, *trainer.learner.ema.shadow_params]
    return torch.cat([full_tensor(tensor.detach()).flatten() for tensor in tensors])[:, None]


def end_on_rank_1(trainer: Trainer, how: Callable[[], None]) -> str:
    """What this process raises when rank 1 does something while all sample."""

    def work() -> None:
        if trainer.processes.rank == 1:
            how()

    trainer.signals.signum = 0
    with trainer.signals:
        try:
            trainer.signals.interruptible(work)
        except BaseException as error:
            return f"{type(error).__name__}: {error}, {trainer.processes.is_collective(error)}"
    return "nothing"


def fail() -> None:
    raise OSError("no space")


def forget_accelerator() -> None:
    """Let the next Trainer ask again what it runs on."""
    AcceleratorState._reset_state(reset_partial_state=True)


def pretend_gpus(name: str) -> None:
    """accelerate shards on GPUs only. Told that these CPUs are some, it does here all that it does there, as
    configs/accelerate/NAME.yaml says."""
    forget_accelerator()
    torch.accelerator.is_available = lambda: True
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "script.py"])
    arguments = _validate_launch_command(arguments)[0]
    os.environ.update(prepare_multi_gpu_env(arguments))
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def take_part(rank: int, count: int, port: int, log: Path, work: Callable[..., None], arguments: tuple) -> None:
    """Do the work as one of `count` processes; the output goes to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    work(*arguments)


def command(name: str, arguments: list[str]) -> None:
    """A command of the package, as each process runs it."""
    assert importlib.import_module(f"fastflowgrpo.{name}").main(arguments) == 0


def main(count: int, folder: Path, output: Path, arguments: list[str]) -> None:
    """The runs of a process; what it saw is written into a file in `output`."""
    seen = {}
    if count == 4:
        pretend_gpus("hsdp")
        os.environ.update(PARALLELISM_CONFIG_DP_REPLICATE_SIZE="2", PARALLELISM_CONFIG_DP_SHARD_SIZE="2")
        seen["few"] = train(config_of(folder, output / "few", updates=1, rank=0, evaluated=3))
    else:
        seen["lora"] = train(config_of(folder, output / "lora", ahead=2), resumes=True)
        try:
            Trainer(config_of(folder, output / "lora"))
        except UserError as error:
            seen["error"] = str(error)
        forget_accelerator()
        seen["full"] = train(config_of(folder, output / "full", rank=0), resumes=True)
        forget_accelerator()
        seen["nft"] = train(config_of(folder, output / "nft", algorithm="nft"), resumes=True)
        forget_accelerator()
        seen["z_image"] = train(z_image_config(folder, output / "z_image"))
        pretend_gpus("fsdp2")
        seen["nft sharded"] = train(config_of(folder, output / "nft sharded", algorithm="nft"), resumes=True)
        pretend_gpus("fsdp2")
        seen["lora sharded"] = train(config_of(folder, output / "lora sharded", ahead=2), resumes=True)
        pretend_gpus("fsdp2")
        seen["full sharded"] = train(config_of(folder, output / "full sharded", rank=0), resumes=True)
        pretend_gpus("fsdp2")
        trainer = Trainer(config_of(folder, output / "bfloat16", dtype="bfloat16"))
        batch, _ = trainer.collect(0)
        stats = trainer.learner.accumulate(batch, trainer.objective.micro_batches(batch, 0, len(batch.advantages)))
        seen["ratio"] = torch.cat([s["ratio"] for s in stats if s])
        trainer.learner.optimizer.zero_grad()
        seen["update"] = trainer.learner.update(batch)
        seen["dtypes"] = {p.dtype for p in trainer.policy.module.parameters()}
        forget_accelerator()
        torch.accelerator.is_available = lambda: False
        trainer = Trainer(config_of(folder, output / "ends"))
        seen["ends"] = [
            end_on_rank_1(trainer, fail),
            end_on_rank_1(trainer, lambda: os.kill(os.getpid(), signal.SIGTERM)),
            end_on_rank_1(trainer, lambda: None),
        ]
    torch.save(seen, output / f"{count}-{os.environ['RANK']}.pt")
    if arguments:  # last, for it ends the process group
        forget_accelerator()
        command("train", arguments)
    else:
        PartialState().destroy_process_group()
