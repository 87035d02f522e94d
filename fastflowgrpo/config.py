"""Every setting of a run, and how it is read, checked and saved. The defaults train the bundled shapes model.

Nothing here imports torch, so that ``--help`` and a wrong setting answer at once.
"""

import difflib
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

Settings = TypeVar("Settings")

TOKEN = "FASTFLOWGRPO_TOKEN"  # environment variable: the bearer token of reward servers and of their clients


class ConfigError(ValueError):
    """What the user can put right: a setting, a file, a model. A command prints it as one line and exits with 2."""


@dataclass
class PolicyConfig:
    """How the model is loaded and which of its weights are trained."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute dtype of the frozen weights; trained weights are always float32."""
    lora_rank: int | None = None
    """Rank of the LoRA adapter; 0 trains the whole transformer. By default 32, and 0 for the bundled model."""
    lora_alpha: int = 64
    """LoRA scale: the update is multiplied by lora_alpha / lora_rank."""
    lora_targets: list[str] | None = None
    """Names of the linear layers that carry the adapter, matched from the end of the module name; by default the model
    family's list, see docs/models.md."""
    lora: str | None = None
    """LoRA to go on from, with its own rank, scale and layers: a .safetensors file, a folder or a hub id."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the transformer's blocks for the backward pass and compute the rest again."""
    attention: str | None = None
    """Attention backend, by diffusers' names: native, flash, xformers, ...; by default diffusers' own choice."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile."""
    distilled_guidance: float = 3.5
    """Guidance that FLUX.1-dev takes as an input, in training and evaluation."""
    decode_batch_size: int = 32
    """Images, or videos, decoded at once."""
    max_sequence_length: int | None = None
    """Text tokens of a prompt embedding, T5's for SD3; by default 256 for SD3 (0 without T5) and 512 for the others."""
    embeddings_dir: str | None = None
    """Folder of prompt embeddings: all prompts are encoded into it at the start, then the text encoders are freed."""


@dataclass
class PromptsConfig:
    """Where prompts come from."""

    train: str = "shapes"
    """A .txt file (one prompt a line), a GenEval .jsonl file, or bundled ones: shapes, geneval, ocr, general."""
    eval: str | None = None
    """Evaluation prompts, as for train; by default held-out ones where train's are bundled, else some of train's."""
    per_epoch: int = 24
    """Groups (distinct prompts) per epoch."""
    mix: dict[str, float] | None = None
    """GenEval tag weights; by default the paper's: position 7, counting 5, color_attr 3, colors 1, two_object 1."""


@dataclass
class RolloutConfig:
    """How training images are sampled."""

    group_size: int = 24
    """Images per prompt: the group that rewards are compared within."""
    num_steps: int = 10
    """Denoising steps in training (evaluation has its own)."""
    dynamics: Literal["flow_sde", "flow_cps", "dance_sde", "ode"] = "flow_sde"
    """Sampler of the steps in the window; ode has no noise and no log-prob, so it is for dpo, sft and rwr alone."""
    noise_level: float = 0.7
    """Noise level a (eta for dance_sde) of the stochastic steps."""
    log_prob: Literal["auto", "normalised", "unnormalised"] = "auto"
    """Log-prob definition; auto is unnormalised for flow_cps and normalised for the others."""
    window_size: int | None = 3
    """Steps that are stochastic and trained; the others follow the ODE. null: all steps but the last."""
    window_start: tuple[int, int] = (0, 6)
    """The window's first step is drawn from [low, high) once per group, or moves through it (window_stride)."""
    window_stride: int = 0
    """Steps by which the window moves, from low on and up to high - 1, in all groups at once; 0: it is drawn."""
    window_epochs: int = 1
    """Epochs between two moves of the window."""
    guidance_scale: float = 1.0
    """Classifier-free guidance in training; 1 runs the conditional branch alone."""
    same_noise: bool = False
    """Start all images of a group from the same initial noise."""
    height: int | None = None
    """Image height in pixels; by default the model's own."""
    width: int | None = None
    """Image width in pixels; by default the model's own."""
    num_frames: int | None = None
    """Frames of a video; by default the model's own. Only for models of videos."""
    batch_size: int = 288
    """Images sampled at once; a multiple of group_size."""


@dataclass
class AdvantageConfig:
    """How rewards become advantages."""

    mode: Literal["sum", "gdpo"] = "sum"
    """Normalise the weighted sum of the rewards, or each of them before they are weighted and summed (GDPO)."""
    std: Literal["global", "group", "none"] = "global"
    """What the centred rewards are divided by: the batch's standard deviation, the group's, or nothing."""
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""


@dataclass
class UpdateConfig:
    """What is learned from an epoch's images, and how."""

    algorithm: Literal["grpo", "grpo_guard", "dpo", "sft", "rwr"] = "grpo"
    """Policy gradient on the sampled steps (grpo, grpo_guard), or flow matching to the images: dpo the best of a group
    against the worst, sft the best, rwr all by weight."""
    data: Literal["online", "offline"] = "online"
    """Images of the policy under training or, for dpo, sft and rwr, of the model as it was loaded."""
    noise_draws: int = 1
    """Random noise levels at which dpo, sft and rwr learn an image."""
    dpo_beta: float = 100.0
    """How strongly dpo is held to the reference; lower lets it go further."""
    rwr_temperature: float = 1.0
    """The weights of rwr are softmax(reward / rwr_temperature) within a group."""
    per_epoch: int = 2
    """Optimiser updates per epoch; the groups of an epoch are split evenly among them."""
    batch_size: int = 288
    """(image, step) or (image, noise draw) pairs per forward and backward pass."""
    learning_rate: float = 3e-4
    """AdamW learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: float = 1e-4
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    clip_range: float = 0.01
    """The ratio is clipped to [1 - clip_range, 1 + clip_range]."""
    replay_tolerance: float = 0.5
    """Largest difference of a replayed log-prob from the rollout's at the start, as a share of clip_range."""
    kl: Literal["flow_grpo", "exact", "velocity"] = "velocity"
    """KL to the reference: the step's without dt (Flow-GRPO's), the exact one, or the squared velocity difference."""
    kl_weight: float = 0.0
    """Weight of the KL term; 0 skips the reference pass."""
    ema_decay: float = 0.9
    """Decay of the averaged weights that are evaluated and saved; 0 uses the raw weights."""
    ema_every: int = 2
    """Updates between two steps of the average."""


@dataclass
class EvaluationConfig:
    """Sampling with the ODE on the evaluation prompts."""

    every: int = 40
    """Epochs between evaluations; the first and the last state are always evaluated, 0 does only these."""
    num_steps: int = 40
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance; by default the rollout's."""
    images_per_prompt: int = 6
    """Images per evaluation prompt."""
    batch_size: int = 288
    """Images sampled at once."""


@dataclass
class Config:
    """A Flow-GRPO training run. The defaults train the bundled shapes model on its own prompts."""

    model: str = "shapes"
    """Diffusers pipeline: a local folder, a hub id, or "shapes" for the bundled model."""
    output_dir: str = "runs/shapes"
    """Run directory: config, metrics, images, checkpoints."""
    overwrite: bool = False
    """Replace the run that output_dir already holds, unless it is resumed."""
    resume: str | None = None
    """Go on with the run in output_dir: from its "latest" checkpoint (anew if there is none), or from this folder."""
    seed: int = 0
    """Seed of everything random."""
    epochs: int = 120
    """Epochs: rollout, scoring, update."""
    save_every: int = 20
    """Epochs between two checkpoints; 0 saves one only when the run ends or is interrupted."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept, the newest; by default all."""
    dry_run: bool = False
    """Print the batches, the memory and the FLOPs of such a run, and stop; no weights are loaded."""
    num_processes: int | None = None
    """Processes that dry_run reckons with; by default those of this launch."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Experiment trackers, by accelerate's names: tensorboard, wandb, ..."""
    hub_model_id: str | None = None
    """Repository OWNER/NAME of the Hugging Face Hub that gets the last weights and their card when the run ends."""
    hub_private: bool | None = None
    """Whether that repository, if it has to be made, is private; by default as its owner's settings say."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: dict[str, Any] = field(default_factory=lambda: {"geneval": {"weight": 1.0, "strict": 0.6}})
    """Weight of each reward, or an object with its weight and settings; my_module:my_reward for a function of yours."""
    max_missing: float = 0.1
    """Largest share of an epoch's images that may go without a score; more stop the run."""
    reward_frames: int = 5
    """Frames of a video that rewards score, evenly spaced; the video's score is their mean."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class EvaluateConfig:
    """An evaluation, `python -m fastflowgrpo.evaluate`: of a model, of its trained weights, or of both side by side."""

    run: str | None = None
    """Run directory: gives all that is not set here, from its config.yaml, and its last checkpoint."""
    model: str = "shapes"
    """Diffusers pipeline: a local folder, a hub id, or "shapes" for the bundled model."""
    checkpoint: str | None = None
    """Folder of trained weights, a LoRA or a whole transformer, as train writes them."""
    weights: Literal["base", "trained", "both"] = "both"
    """What is evaluated: the model as it is, with its checkpoint, or both side by side. Without one, the model."""
    output_dir: str = "runs/evaluation"
    """Folder of the results: evaluation.json, evaluation.md, grid.png."""
    overwrite: bool = False
    """Replace the results that output_dir already holds."""
    prompts: str | None = None
    """As prompts.eval of train; by default what a run evaluates on."""
    rewards: dict[str, Any] | str = field(default_factory=lambda: Config().rewards)
    """Names separated by commas, or an object as in train, whose weights make the total reward."""
    num_steps: int = 40
    """Denoising steps of the ODE."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 runs the conditional branch alone."""
    images_per_prompt: int = 6
    """Images per prompt."""
    height: int | None = None
    """Image height in pixels; by default the model's own."""
    width: int | None = None
    """Image width in pixels; by default the model's own."""
    num_frames: int | None = None
    """Frames of a video; by default the model's own number."""
    reward_frames: int = 5
    """Frames of a video that rewards score, as in train."""
    batch_size: int = 288
    """Images sampled at once."""
    seed: int = 0
    """Seed of the initial noise; with 0 it is that of train's evaluations."""
    diversity_model: str | None = None
    """CLIP, a hub id or a folder, whose image embeddings measure diversity, beside pixels and latents."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)


@dataclass
class ServerConfig:
    """A reward server, `python -m fastflowgrpo.serve`."""

    rewards: dict[str, Any] | str
    """Names of the rewards to serve, separated by commas, or an object with the settings of each."""
    host: str = "127.0.0.1"
    """Address to listen on. Beyond this machine only with a token, in the environment variable FASTFLOWGRPO_TOKEN."""
    port: int = 18085
    """Port to listen on; 0 takes a free one."""
    batch_size: int = 64
    """Images scored at once, from several requests where these are smaller."""
    delay: float = 0.01
    """Seconds that a request waits for others to fill the batch."""
    timeout: float = 300.0
    """Seconds to read a request, and to score it."""
    queue: int = 128
    """Requests held at once; more are told to come back."""
    max_request_mib: int = 128
    """Largest request, in MiB."""
    max_images: int = 256
    """Most images in a request."""
    max_pixels: int = 2**26
    """Most pixels of a request's images together."""


_AT_LEAST = {
    0: (
        "seed",
        "save_every",
        "max_missing",
        "policy.lora_rank",
        "policy.max_sequence_length",
        "policy.distilled_guidance",
        "rollout.guidance_scale",
        "update.learning_rate",
        "update.weight_decay",
        "update.kl_weight",
        "update.betas",
        "update.ema_decay",
        "rollout.window_start",
        "rollout.window_stride",
        "evaluation.every",
        "evaluation.guidance_scale",
    ),
    1: (
        "epochs",
        "checkpoints_total_limit",
        "num_processes",
        "reward_frames",
        "policy.lora_alpha",
        "policy.decode_batch_size",
        "prompts.per_epoch",
        "rollout.window_size",
        "rollout.window_epochs",
        "rollout.height",
        "rollout.width",
        "rollout.num_frames",
        "rollout.batch_size",
        "update.per_epoch",
        "update.noise_draws",
        "update.batch_size",
        "update.ema_every",
        "evaluation.num_steps",
        "evaluation.images_per_prompt",
        "evaluation.batch_size",
    ),
    2: ("rollout.group_size", "rollout.num_steps"),
}
_ABOVE_ZERO = (
    "update.replay_tolerance",
    "update.dpo_beta",
    "update.rwr_temperature",
    "rollout.noise_level",
    "advantage.clip",
    "update.max_grad_norm",
    "update.clip_range",
)
_AT_MOST_ONE = ("max_missing",)
_BELOW_ONE = ("update.clip_range", "update.betas", "update.ema_decay")

POLICY_GRADIENTS = ("grpo", "grpo_guard")
# What only some choices read: (setting, the choices that do) -> settings that must stay at their defaults elsewhere.
_READ_BY: dict[tuple[str, tuple[Any, ...]], tuple[str, ...]] = {
    ("update.algorithm", POLICY_GRADIENTS): (
        "rollout.log_prob",
        "advantage.mode",
        "advantage.std",
        "advantage.clip",
        "update.clip_range",
        "update.replay_tolerance",
        "update.kl",
        "update.kl_weight",
    ),
    ("update.algorithm", ("dpo", "sft", "rwr")): ("update.data", "update.noise_draws"),
    ("update.algorithm", ("dpo",)): ("update.dpo_beta",),
    ("update.algorithm", ("rwr",)): ("update.rwr_temperature",),
    ("rollout.dynamics", ("flow_sde", "flow_cps", "dance_sde")): (
        "rollout.noise_level",
        "rollout.window_size",
        "rollout.window_start",
        "rollout.window_stride",
        "rollout.same_noise",
    ),
}
# What may be another from one start of a run to the next: it changes nothing that is computed but its rounding, or is
# what a run that stopped asks for.
MAY_CHANGE = (
    "epochs",
    "save_every",
    "checkpoints_total_limit",
    "trackers",
    "max_missing",
    "policy.decode_batch_size",
    "policy.embeddings_dir",
    "policy.gradient_checkpointing",
    "policy.attention",
    "policy.compile",
    "rollout.batch_size",
    "update.batch_size",
    "update.learning_rate",
    "update.replay_tolerance",
    "evaluation.every",
    "evaluation.batch_size",
)


def validate(config: Config) -> None:
    """Checks that the values of a config are in range and fit together.

    Raises:
        ConfigError: Naming the first setting that does not, with the limit or the arithmetic that fails.
    """

    def values(name: str) -> tuple[float, ...]:
        value = attrgetter(name)(config)
        return value if isinstance(value, tuple) else () if value is None else (value,)

    # Written as "not (a >= b)" so that NaN fails too.
    for limit, names in _AT_LEAST.items():
        for name in names:
            for value in values(name):
                if not value >= limit:
                    raise ConfigError(f"{name}: must be at least {limit}, got {value}")
    for name in _ABOVE_ZERO:
        for value in values(name):
            if not value > 0:
                raise ConfigError(f"{name}: must be above 0, got {value}")
    for name in _AT_MOST_ONE:
        for value in values(name):
            if not value <= 1:
                raise ConfigError(f"{name}: must be at most 1, got {value}")
    for name in _BELOW_ONE:
        for value in values(name):
            if not value < 1:
                raise ConfigError(f"{name}: must be below 1, got {value}")

    policy, prompts, rollout, update = config.policy, config.prompts, config.rollout, config.update
    advantage = config.advantage
    if policy.lora is not None and policy.lora_rank == 0:
        raise ConfigError(
            "policy.lora_rank: is 0, which trains the whole transformer; leave it out to go on from a LoRA"
        )
    if policy.lora_rank != 0 and policy.lora_targets == []:
        raise ConfigError("policy.lora_targets: is empty; set policy.lora_rank to 0 to train the whole transformer")
    if rollout.dynamics == "flow_cps" and rollout.noise_level > 1:
        raise ConfigError(f"rollout.noise_level: must be at most 1 for flow_cps, got {rollout.noise_level}")
    if rollout.batch_size % rollout.group_size:
        division = _division(rollout.batch_size, rollout.group_size)
        raise ConfigError(f"rollout.batch_size: must be a multiple of rollout.group_size, but {division}")
    if prompts.per_epoch % update.per_epoch:
        division = _division(prompts.per_epoch, update.per_epoch)
        raise ConfigError(f"prompts.per_epoch: must be a multiple of update.per_epoch, but {division}")
    if update.algorithm in POLICY_GRADIENTS and rollout.dynamics == "ode":
        raise ConfigError(
            f"rollout.dynamics: update.algorithm {update.algorithm} learns from log-probs, and ode has none; "
            "choose flow_sde, flow_cps or dance_sde, or update.algorithm dpo, sft or rwr"
        )
    _check_unread(config)
    if advantage.mode == "gdpo" and len(config.rewards) < 2:
        raise ConfigError("advantage.mode: gdpo normalises each of several rewards, and there is one")
    if rollout.window_epochs != 1 and not rollout.window_stride:
        raise ConfigError("rollout.window_epochs: the window does not move unless rollout.window_stride is above 0")
    if rollout.window_size is None and rollout.window_stride:
        raise ConfigError("rollout.window_stride: all steps but the last are the window; set rollout.window_size")
    if rollout.window_size is not None and rollout.dynamics != "ode":
        low, high = rollout.window_start
        if low >= high:
            raise ConfigError(f"rollout.window_start: low must be below high, got [{low}, {high})")
        needed, trained = high - 1 + rollout.window_size, rollout.num_steps - 1
        if needed > trained:
            raise ConfigError(
                f"rollout.window_start: a window of {rollout.window_size} steps from step {high - 1} on needs {needed} "
                f"steps, but rollout.num_steps = {rollout.num_steps} has {trained}: the last is never trained"
            )


def _check_unread(config: Config) -> None:
    """Raises ConfigError for a setting that was changed though nothing reads it beside the others."""
    default = Config()
    for (chooser, readers), names in _READ_BY.items():
        choice = attrgetter(chooser)(config)
        if choice not in readers:
            values = {name: (attrgetter(name)(config), attrgetter(name)(default)) for name in names}
            unread = [f"{name} (default {was})" for name, (value, was) in values.items() if value not in (None, was)]
            if unread:
                raise ConfigError(f"{chooser}: {choice} does not use {', '.join(unread)}: leave at the default")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """For error messages: " (did you mean 'x'?)" with the known name nearest to `name`, "" if none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def parse(argv: Sequence[str] | None = None) -> Config:
    """Reads the settings of a run: the defaults, then ``--config`` files and dotted overrides in the order given.

    Args:
        argv: The command line without the program; by default the process's.

    Returns:
        The complete, validated config.

    Raises:
        ConfigError: A name, value or file is wrong, or the values do not fit together (see `validate`).
        SystemExit: With code 0, after ``--help`` or ``--print_config``.
    """
    config = parse_settings(Config, "train", argv)
    validate(config)
    return config


def parse_evaluation(argv: Sequence[str] | None = None) -> EvaluateConfig:
    """Reads the settings of an evaluation, like `parse`; what is not given is the run's, if `--run` names one."""
    config = parse_settings(EvaluateConfig, "evaluate", argv)
    if config.run is not None:
        config = parse_settings(EvaluateConfig, "evaluate", argv, _defaults_of_run(config.run))
    for name in ("num_steps", "images_per_prompt", "batch_size", "height", "width", "num_frames", "reward_frames"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}: must be at least 1, got {value}")
    for name in ("guidance_scale", "seed"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name}: must be at least 0, got {getattr(config, name)}")
    return config


def read_run(run: str | Path) -> Config:
    """The settings of the run that a directory holds.

    Raises:
        ConfigError: It holds none, or its config.yaml has a setting that is wrong or unknown.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run {run} is not the directory of a run: there is no {path}")
    return parse(["--config", str(path)])


def _defaults_of_run(run: str) -> dict[str, Any]:
    """The settings of an evaluation that are those of a run, by dotted name."""
    config = read_run(run)
    evaluation, rollout = config.evaluation, config.rollout
    return {
        "model": config.model,
        "rewards": config.rewards,
        "num_steps": evaluation.num_steps,
        "guidance_scale": rollout.guidance_scale if evaluation.guidance_scale is None else evaluation.guidance_scale,
        "images_per_prompt": evaluation.images_per_prompt,
        "height": rollout.height,
        "width": rollout.width,
        "num_frames": rollout.num_frames,
        "reward_frames": config.reward_frames,
        "batch_size": evaluation.batch_size,
        **{f"policy.{name}": value for name, value in vars(config.policy).items()},
    }


def parse_settings(
    cls: type[Settings], command: str, argv: Sequence[str] | None, defaults: dict[str, Any] | None = None
) -> Settings:
    """Reads a dataclass of settings: its defaults, other `defaults` by dotted name, then the command line's."""
    argv = sys.argv[1:] if argv is None else list(argv)
    types = setting_types(cls)
    groups = [name for name, hint in types.items() if _is_group(hint)]
    options = {"config", "print_config", "help"} | (types.keys() - set(groups))
    open_groups = tuple(f"{name}." for name, hint in types.items() if "dict[" in str(hint))  # rewards.my_reward
    for argument in argv:
        name = argument.partition("=")[0].removeprefix("--").removesuffix("+")
        if argument.startswith("--") and not name.startswith(open_groups):
            if name in groups:
                raise ConfigError(f"{name}: is a group of settings; set one of them, as in --{name}.NAME VALUE")
            _check_name(name, options)
    parser = _parser(cls, command)
    parser.set_defaults(defaults or {})
    return _build(cls, parser.parse_args(_bare_switches(argv, types)).as_dict())


def _bare_switches(argv: list[str], types: dict[str, Any]) -> list[str]:
    """A switch without a value, such as --dry_run, is true."""
    switches = {f"--{name}" for name, hint in types.items() if hint is bool}
    return [
        f"{argument}=true" if argument in switches and following.startswith("--") else argument
        for argument, following in zip_longest(argv, argv[1:], fillvalue="--")
    ]


def save(config: Config, path: str | Path) -> None:
    """Writes the complete config as YAML, which ``--config`` reads back to an equal one."""
    Path(path).write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def setting_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """The dotted name of every setting and group of settings, with its type (a dataclass for a group)."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        types[prefix + name] = hint
        if _is_group(hint):
            types |= setting_types(hint, f"{prefix}{name}.")
    return types


class _Parser(ArgumentParser):
    types: Mapping[str, Any] = MappingProxyType({})  # of the settings, by dotted name

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ConfigError instead of printing the usage."""
        match = re.search(r'Parser key "([^"]+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
        if match and match[1] in self.types:
            raise ConfigError(_wrong_value(match[1], self.types[match[1]], match[2])) from ex
        raise ConfigError(message) from ex


class _ConfigFile(ActionConfigFile):
    """``--config``: an error inside a file names the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            _check_tree(_read(values), parser.types)
            super().__call__(parser, cfg, values, option_string)
        except ConfigError as error:
            raise ConfigError(f"{values}: {error}") from None


def _parser(cls: type, command: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog=f"python -m fastflowgrpo.{command}",
        usage="%(prog)s [--config FILE] [--SETTING VALUE ...]",
    )
    parser.add_argument("--config", action=_ConfigFile, metavar="FILE", help="YAML file of settings.")
    parser.add_class_arguments(cls)
    parser.types = setting_types(cls)
    return parser


def _read(path: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(error.strerror) from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"is not YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"expected settings (name: value), got {settings!r}")
    return settings


def _check_tree(settings: dict[str, Any], types: dict[str, Any], prefix: str = "") -> None:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        _check_name(name, types)
        if _is_group(types[name]):
            if not isinstance(value, dict):
                raise ConfigError(f"{name}: is a group of settings, got {value!r}")
            _check_tree(value, types, f"{name}.")


def _is_group(hint: Any) -> bool:
    return is_dataclass(hint)


def _division(dividend: int, divisor: int) -> str:
    return f"{dividend} = {dividend // divisor} x {divisor} + {dividend % divisor}"


def _check_name(name: str, names: Collection[str]) -> None:
    if name not in names:
        raise ConfigError(f"unknown setting {name}" + (did_you_mean(name, names) or "; --help explains them all"))


def _wrong_value(name: str, hint: Any, value: str) -> str:
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if choices:
        expected = f"one of {', '.join(choices)}"
    elif isinstance(hint, type) and not get_args(hint):
        expected = hint.__name__
    else:
        expected = str(hint).replace("typing.", "").replace("None", "null")
    return f"{name}: expected {expected}, got {value or 'nothing'}" + did_you_mean(value, choices)


def _build(cls: type, settings: dict[str, Any], prefix: str = "") -> Any:
    values = {}
    for name, hint in get_type_hints(cls).items():
        value = settings[name]
        if _is_group(hint):
            value = _build(hint, value, f"{prefix}{name}.")
        elif value is None and type(None) not in get_args(hint):  # jsonargparse takes null for any type
            raise ConfigError(_wrong_value(prefix + name, hint, "null"))
        values[name] = value
    return cls(**values)
