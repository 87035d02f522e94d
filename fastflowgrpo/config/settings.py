"""The settings of all commands, with their defaults and their help. The defaults train the bundled shapes model."""

from dataclasses import dataclass, field
from typing import Any, Literal

TOKEN = "FASTFLOWGRPO_TOKEN"  # environment variable with the bearer token of reward servers and their clients
Dynamics = Literal["flow_sde", "flow_cps", "dance_sde", "ode"]
BUNDLED_MODELS = ("shapes", "shapes_edit")  # which are trained in full unless policy.lora_rank is set


@dataclass
class PolicyConfig:
    """The model: how it is loaded, and which weights are trained."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the transformer's frozen weights and of its computation; trained weights are always float32."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the VAE, which decodes the images that are scored."""
    text_encoder_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the text encoders; their embeddings are rounded to dtype. Default: dtype."""
    quantization: Literal["int8", "float8", "nf4"] | None = None
    """Format of the linear layers' weights in the frozen transformer: a LoRA's base, the KL's reference too, or in full
    training the reference alone. int8 or float8 (torchao) take one byte a weight, nf4 (bitsandbytes, for a LoRA on a
    GPU) half a byte. Default: dtype."""
    offload: bool = False
    """Keep the text encoders, the VAE and the reference of full training in the CPU's memory, and on the GPU only while
    they are used."""
    lora_rank: int | None = None
    """Rank of the LoRA adapter; 0 trains the whole transformer. Default: 32, for the bundled models 0."""
    lora_alpha: int = 64
    """Scale of the LoRA adapter: its output is multiplied by lora_alpha / lora_rank."""
    lora_targets: list[str] | None = None
    """Linear layers that get the adapter, by the end of their module names. Default: the list of the model family, see
    docs/models.md."""
    lora: str | None = None
    """LoRA to continue from, a .safetensors file, a folder or a hub id; it brings its own rank, scale and layers."""
    gradient_checkpointing: bool = False
    """Save memory: keep only the inputs of the transformer blocks and recompute the rest in the backward pass."""
    attention: str | None = None
    """Attention backend by its name in diffusers: native, flash, xformers, ...; SD3 takes only xformers. Default:
    chosen by diffusers."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile."""
    distilled_guidance: float = 3.5
    """Guidance value that FLUX.1-dev and FLUX.2-dev take as an input, in training and evaluation."""
    decode_batch_size: int = 32
    """Images or videos that are decoded at once."""
    max_sequence_length: int | None = None
    """Text tokens of a prompt embedding; for SD3 those of T5. Default: 256 for SD3 (0 without T5), 512 for others."""
    source_height: int | None = None
    """Height in pixels of the source images of an edit, as the model gets them. Default: that of the result."""
    source_width: int | None = None
    """Width in pixels of the source images of an edit, as the model gets them. Default: that of the result."""
    image_to_video: bool = False
    """Load Wan 2.2 TI2V-5B as image to video; its model_index.json names the pipeline of text to video."""
    embeddings_dir: str | None = None
    """Folder for prompt embeddings. All prompts are encoded into it at the start, and the text encoders are freed."""


@dataclass
class PromptsConfig:
    """The prompts of training and evaluation."""

    train: str = "shapes"
    """Training prompts: a .txt file (one prompt a line), a GenEval .jsonl file, FILE.csv:COLUMN, FILE.parquet:COLUMN,
    hf:OWNER/NAME:COLUMN[:SPLIT] (a dataset of the hub), or shapes, geneval, ocr or general. For edits COLUMN is
    TEXT+IMAGE."""
    eval: str | None = None
    """Evaluation prompts, as for train. Default: held-out ones if train is bundled, else 16 of the training prompts."""
    per_epoch: int = 24
    """Prompts per epoch; each gives one group of images."""
    mix: dict[str, float] | None = None
    """Weight of each GenEval tag. Default: the paper's position 7, counting 5, color_attr 3, colors 1, two_object 1."""


@dataclass
class RolloutConfig:
    """The rollout: how training images are sampled."""

    group_size: int = 24
    """Images per prompt. Rewards are compared within this group."""
    candidates: int | None = None
    """Seeds that are explored per prompt with few steps. The best and the worst of them, group_size in all, are sampled
    again with all steps and trained on. null: no exploration."""
    candidate_steps: int = 6
    """Denoising steps of a candidate, by the ODE."""
    candidate_solver: Literal["euler", "dpm_solver"] = "dpm_solver"
    """Solver of a candidate, see solver."""
    num_steps: int = 10
    """Denoising steps in training; evaluation.num_steps is for the evaluation."""
    dynamics: Dynamics = "flow_sde"
    """Sampler of the steps in the window. ode has no noise and no log-probs: only dpo, sft and rwr can use it."""
    noise_level: float = 0.7
    """Noise level of the stochastic steps: a of flow_sde and flow_cps, eta of dance_sde."""
    solver: Literal["euler", "dpm_solver"] = "euler"
    """Solver of the ode dynamics and of the steps after the window; dpm_solver is DPM-Solver++ of second order, which
    needs fewer steps."""
    log_prob: Literal["auto", "normalised", "unnormalised"] = "auto"
    """Definition of the log-prob; auto means unnormalised for flow_cps and normalised for the others."""
    window_size: int | None = 3
    """Steps in the window, which are stochastic and trained; the others follow the ODE. null: all but the last step."""
    window_start: tuple[int, int] = (0, 6)
    """Range [low, high) of the window's first step. It is drawn once per group, or it slides (see window_stride)."""
    window_stride: int = 0
    """Steps by which the window slides from low to high - 1, in all groups alike; 0 draws its first step instead."""
    window_epochs: int = 1
    """Epochs between two moves of a sliding window."""
    tail_steps: int | None = None
    """Most steps after the window, over the same range of noise levels. Default: all that num_steps has left."""
    guidance_scale: float = 1.0
    """Classifier-free guidance scale in training; 1 means no guidance, and only the conditional branch runs."""
    guidance_scale_2: float | None = None
    """Guidance scale at the noise levels of the second of two transformers (Wan 2.2 A14B). Default: guidance_scale."""
    keep_unconditional: bool = False
    """Keep the unconditional velocities of the trained steps, so that an epoch's first update need not compute them."""
    offload_trajectory: bool = False
    """Keep the trained steps in the CPU's memory, from where each micro-batch is copied ahead. For videos."""
    same_noise: bool = False
    """Start all images of a group from the same initial noise; the steps before its window are computed once."""
    height: int | None = None
    """Image height in pixels. Default: the model's own."""
    width: int | None = None
    """Image width in pixels. Default: the model's own."""
    num_frames: int | None = None
    """Frames of a video, for video models only. Default: the model's own."""
    batch_size: int = 288
    """Images sampled at once in the rollout; a multiple of group_size."""
    ahead: int = 0
    """Groups of the next epoch that are sampled before the update and scored beside it, for slow rewards; a multiple of
    the number of processes. The weights that sample them are an epoch older, which the ratio corrects."""

    @property
    def guidance(self) -> float | tuple[float, float]:
        """The guidance scale, or both."""
        return _scales(self.guidance_scale, self.guidance_scale_2)


def _scales(first: float, second: float | None) -> float | tuple[float, float]:
    return first if second is None else (first, second)


@dataclass
class AdvantageConfig:
    """How rewards become advantages."""

    mode: Literal["sum", "gdpo"] = "sum"
    """Several rewards: sum normalises their weighted sum; gdpo normalises each and then sums them with the weights."""
    std: Literal["global", "group", "none"] = "global"
    """Divide by the standard deviation of all rewards of the epoch (global), of the group, or by nothing (none)."""
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""


@dataclass
class UpdateConfig:
    """The update: what is learned from the images of an epoch."""

    algorithm: Literal["grpo", "grpo_guard", "nft", "awm", "dgpo", "dpo", "sft", "rwr"] = "grpo"
    """Loss. grpo and grpo_guard are policy gradients on the sampled steps. The others train on the images with noise
    added: nft and awm weight each by its advantage, dgpo prefers the better images of a group to its worse ones, dpo
    the best to the worst, sft fits the best, rwr fits all, weighted by reward."""
    data: Literal["online", "offline"] = "online"
    """Who samples the images: the policy in training (online), or the loaded model (offline, for dpo, sft and rwr)."""
    noise_draws: int = 1
    """Random noise levels per image and update, for all but grpo and grpo_guard."""
    noise_levels: Literal["uniform", "stratified", "rollout"] = "uniform"
    """Where these levels are drawn from: [0, 1]; [0, 1] in as many equal parts as an image has draws, each from its own
    (stratified); or the rollout's own steps but the last, evenly spread."""
    dpo_beta: float = 100.0
    """Strength with which dpo stays near the reference; a lower value allows larger changes."""
    nft_beta: float = 1.0
    """Distance of nft's implicit positive and negative policies from the old policy, as a share of the policy's."""
    awm_clip_range: float = 1.0
    """awm clips its ratio to [1 - awm_clip_range, 1 + awm_clip_range]."""
    old_weight: float = 1.0
    """Weight of the squared distance to the old policy's velocity, for awm."""
    dgpo_beta: float = 100.0
    """Strength with which dgpo turns to the groups whose preference the policy does not have yet."""
    dgpo_clip_range: float = 0.01
    """dgpo leaves out a sample whose likelihood has moved by more than this share in the direction of its advantage."""
    old_decay_slope: float = 0.001
    """Growth per update of the share of itself that the old policy of nft, awm and dgpo keeps after an epoch."""
    old_decay_start: int = 0
    """Updates before that share begins to grow."""
    old_decay_max: float = 0.5
    """Largest share of itself that the old policy keeps."""
    rwr_temperature: float = 1.0
    """rwr weights an image by softmax(reward / rwr_temperature) within its group."""
    per_epoch: int = 2
    """Optimiser updates per epoch; each uses an equal share of the groups."""
    batch_size: int = 288
    """Size of a micro-batch: (image, step) or (image, noise level) pairs per forward and backward pass. 0: the largest
    that fits in memory by the estimate of dry_run. Unless it equals rollout.batch_size, the ratio starts at 1 only up
    to rounding."""
    halve_batch_size: bool = False
    """Out of memory in an update: halve batch_size, repeat the update, and go on with that size."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """Optimiser: AdamW, or AdamW with its averages of the gradient in 8 bits (torchao), which takes 6 bytes less for
    each trained weight and follows slightly other steps. For full training."""
    learning_rate: float = 3e-4
    """AdamW learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: float = 1e-4
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """The gradient is clipped to this norm."""
    clip_range: float = 0.01
    """The probability ratio is clipped to [1 - clip_range, 1 + clip_range]."""
    trust_region: Literal["clip", "divergence"] = "clip"
    """How grpo keeps the policy near the one that sampled: it clips the ratio, or it leaves out the pairs that have
    diverged by more than divergence_limit in the direction of their advantage."""
    divergence_limit: float = 1e-5
    """Limit of the divergence trust region: mean of (mean - mean_old)^2 / (2 std^2) of a step."""
    replay_tolerance: float = 0.5
    """Largest difference between the log-probs of rollout and replay at the start, as a multiple of clip_range or
    divergence_limit."""
    kl: Literal["flow_grpo", "exact", "velocity"] = "velocity"
    """KL to the reference: as in the code of Flow-GRPO (without dt), exact, or the squared difference of velocities."""
    kl_weight: float = 0.0
    """Weight of the KL; 0 skips the forward pass of the reference."""
    kl_share: float = 1.0
    """Share of the pairs, drawn at random, that have a KL and a norm guard, scaled to have the mean of all pairs."""
    norm_guard_weight: float = 0.0
    """Weight of relu(|v| / |v_ref| - 1)^2, which keeps the norm of the velocity at the reference's or below."""
    ema_decay: float = 0.9
    """Decay of the averaged weights (EMA), which are evaluated and saved; 0 uses the raw weights."""
    ema_every: int = 2
    """Optimiser updates between two steps of the EMA."""


@dataclass
class EvaluationConfig:
    """The evaluation during training: images of the evaluation prompts, sampled with the ODE."""

    every: int = 40
    """Epochs between two evaluations. The start and the end are always evaluated; 0 evaluates only these."""
    num_steps: int = 40
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance scale. Default: rollout.guidance_scale."""
    guidance_scale_2: float | None = None
    """Guidance scale of the second of two transformers. Default: guidance_scale if that is set, else the rollout's."""
    images_per_prompt: int = 6
    """Images per evaluation prompt."""
    batch_size: int = 288
    """Images sampled at once."""
    gallery: int = 48
    """Images of each evaluation that the run's gallery keeps for `python -m fastflowgrpo.view`; 0 keeps no gallery."""
    guard: dict[str, Any] | str | None = None
    """Reward that is evaluated and never trained on: its name, or an object as in rewards, with one entry. The best
    checkpoint is the best by it. Default: none."""
    guard_patience: int = 2
    """Evaluations in a row in which the guard must have fallen, by more than its standard error from its best."""
    guard_action: Literal["warn", "stop"] = "stop"
    """What happens then: the run only warns, or it stops."""


def guard_reward(guard: dict[str, Any] | str | None) -> dict[str, Any]:
    """`evaluation.guard` in the form of `rewards`: its name and its weight or settings; {} if there is none."""
    return {guard: 1.0} if isinstance(guard, str) else guard or {}


@dataclass
class Config:
    """A Flow-GRPO training run. The defaults train the bundled shapes model on its own prompts."""

    model: str = "shapes"
    """Diffusers pipeline: a local folder, a hub id, or "shapes" or "shapes_edit" for a bundled model."""
    output_dir: str = "runs/shapes"
    """Run directory: config, metrics, images, checkpoints."""
    overwrite: bool = False
    """Replace the run that output_dir already holds, unless it is resumed."""
    resume: str | None = None
    """Continue the run in output_dir from this checkpoint folder, from "latest" (starts anew if there is none), or from
    "best", the one with the best evaluation."""
    seed: int = 0
    """Seed of all random numbers."""
    epochs: int = 120
    """Epochs to train; an epoch is a rollout, its scoring and its updates."""
    save_every: int = 20
    """Epochs between two checkpoints; 0 saves only when the run ends or is interrupted."""
    checkpoints_total_limit: int | None = None
    """Number of checkpoints to keep, the newest; the best is kept besides. Default: all."""
    dry_run: bool = False
    """Print the batches, memory and FLOPs of the run without loading weights, and stop."""
    num_processes: int | None = None
    """Number of processes that share the work. Default: the launcher's; without one, 1 with a GPU, else one per free
    physical core. A dry run assumes the launcher's number or 1 if this is not set."""
    hang_warning: float | None = 300.0
    """Seconds that one of several processes waits until it prints which others have not come, and where they are. null:
    it never does."""
    memory_gb: float | None = None
    """Memory that a process may fill in 10^9 bytes, for update.batch_size 0. Default: 90 % of what is free."""
    fit: str | None = None
    """Memory of a GPU, such as 24GB (10^9 bytes): dry_run chooses the settings with which the run fits, and prints
    them."""
    gpu: Literal["a800", "a100", "h100", "h200", "4090"] | None = None
    """GPU on which dry_run says how many seconds an epoch takes at least. Default: it does not say."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Experiment trackers by their names in accelerate: tensorboard, wandb, ..."""
    hub_model_id: str | None = None
    """Hugging Face Hub repository OWNER/NAME to which the last weights and a model card are pushed at the end."""
    hub_private: bool | None = None
    """Whether to create the Hub repository as a private one. Default: the owner's setting."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: dict[str, Any] = field(default_factory=lambda: {"geneval": {"weight": 1.0, "strict": 0.6}})
    """Weight of each reward, or an object with its weight and settings. Your own function is my_module:my_reward."""
    max_missing: float = 0.1
    """Largest share of images without a score in an epoch, 0 to 1; above it the run stops."""
    reward_frames: int = 5
    """Evenly spaced frames of a video that are scored; the score of the video is their mean."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def evaluation_guidance(self) -> float | tuple[float, float]:
        """The guidance scale of the evaluation, or both."""
        own, rollout = self.evaluation, self.rollout
        if own.guidance_scale is not None:
            return _scales(own.guidance_scale, own.guidance_scale_2)
        second = rollout.guidance_scale_2 if own.guidance_scale_2 is None else own.guidance_scale_2
        return _scales(rollout.guidance_scale, second)


@dataclass
class EvaluateConfig:
    """An evaluation of a model, of its trained weights, or of both: `python -m fastflowgrpo.evaluate`."""

    run: str | None = None
    """Run directory. Its config.yaml gives all settings that are not set here, and its last checkpoint the weights."""
    model: str = "shapes"
    """Diffusers pipeline: a local folder, a hub id, or "shapes" or "shapes_edit" for a bundled model."""
    checkpoint: str | None = None
    """Folder of trained weights, a LoRA or a whole transformer, as the train command writes it; or "best", the run's
    checkpoint with the best evaluation."""
    weights: Literal["base", "trained", "both"] = "both"
    """Evaluate the model itself, the model with its checkpoint, or both. Without a checkpoint: the model itself."""
    output_dir: str = "runs/evaluation"
    """Folder for the results: evaluation.json, evaluation.md and grid.png."""
    overwrite: bool = False
    """Replace the results that output_dir already holds."""
    prompts: str | None = None
    """Evaluation prompts, as prompts.eval of train. Default: the evaluation prompts of the run."""
    rewards: dict[str, Any] | str = field(default_factory=lambda: Config().rewards)
    """Rewards: names separated by commas, or an object as in train, whose weights give the total reward."""
    num_steps: int = 40
    """Denoising steps of the ODE."""
    guidance_scale: float = 1.0
    """Classifier-free guidance scale; 1 means no guidance."""
    guidance_scale_2: float | None = None
    """Guidance scale at the noise levels of the second of two transformers (Wan 2.2 A14B). Default: guidance_scale."""
    images_per_prompt: int = 6
    """Images per prompt."""
    height: int | None = None
    """Image height in pixels. Default: the model's own."""
    width: int | None = None
    """Image width in pixels. Default: the model's own."""
    num_frames: int | None = None
    """Frames of a video, for video models only. Default: the model's own."""
    reward_frames: int = 5
    """Evenly spaced frames of a video that are scored, as in train."""
    batch_size: int = 288
    """Images sampled at once."""
    seed: int = 0
    """Seed of the initial noise; 0 gives the noise of the evaluations during training."""
    diversity_model: str | None = None
    """CLIP model (hub id or folder) whose image embeddings measure diversity too. Default: only pixels and latents."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    @property
    def guidance(self) -> float | tuple[float, float]:
        """The guidance scale, or both."""
        return _scales(self.guidance_scale, self.guidance_scale_2)


@dataclass
class DemoConfig:
    """A web page that shows a prompt's images before and after training: `python -m fastflowgrpo.demo`."""

    run: str | None = None
    """Run directory. Its config.yaml gives all settings that are not set here, and its checkpoints are the choices."""
    model: str = "shapes"
    """Diffusers pipeline: a local folder, a hub id, or "shapes" or "shapes_edit" for a bundled model."""
    checkpoint: str | None = None
    """Folder of trained weights, a LoRA or a whole transformer, as the train command writes it. Default: the
    checkpoints of the run, or policy.lora; without any of them the page shows the model alone."""
    prompts: str | None = None
    """Example prompts, as prompts.eval of train. Default: those of the run, and some for GenEval, OCR and PickScore."""
    rewards: dict[str, Any] | str = field(default_factory=lambda: Config().rewards)
    """Rewards that score the images: names separated by commas, or an object as in train."""
    num_images: int = 4
    """Images of each column, to begin with."""
    num_steps: int = 40
    """Denoising steps, to begin with."""
    guidance_scale: float = 1.0
    """Classifier-free guidance scale, to begin with; 1 means no guidance."""
    noise_level: float = 0.7
    """Noise level of the stochastic samplers, to begin with."""
    height: int | None = None
    """Image height in pixels. Default: the model's own."""
    width: int | None = None
    """Image width in pixels. Default: the model's own."""
    num_frames: int | None = None
    """Frames of a video, for video models only. Default: the model's own."""
    reward_frames: int = 5
    """Evenly spaced frames of a video that are scored, as in train; the page shows the middle one."""
    max_images: int = 8
    """Largest number of images that a visitor can ask for; they are sampled at once."""
    max_steps: int = 100
    """Largest number of denoising steps that a visitor can ask for."""
    queue: int = 16
    """Requests that wait at once, one is computed at a time; further ones are told to try again later."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever can reach it can use the page."""
    port: int | None = None
    """Port to listen on. Default: the first free one from 7860."""
    share: bool = False
    """Make the page public through a tunnel of Gradio's, at an address that is printed."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)


@dataclass
class ServerConfig:
    """A reward server, `python -m fastflowgrpo.serve`."""

    rewards: dict[str, Any] | str
    """Rewards to serve: names separated by commas, or an object with the settings of each."""
    host: str = "127.0.0.1"
    """Address to listen on. One beyond this machine needs a token in the environment variable FASTFLOWGRPO_TOKEN."""
    port: int = 18085
    """Port to listen on; 0 takes a free one."""
    batch_size: int = 64
    """Images scored at once; small requests are scored together."""
    delay: float = 0.01
    """Seconds to wait for more requests that fill a batch."""
    timeout: float = 300.0
    """Seconds allowed for reading a request, and for scoring it."""
    queue: int = 128
    """Requests held at once; further ones are told to try again later."""
    max_request_mib: int = 128
    """Largest size of a request in MiB."""
    max_images: int = 256
    """Largest number of images in a request."""
    max_pixels: int = 2**26
    """Largest number of pixels in all images of a request."""
