"""Every setting of the commands, with its default and its help. The defaults train the bundled shapes model."""

from dataclasses import dataclass, field
from typing import Any, Literal

TOKEN = "FASTFLOWGRPO_TOKEN"  # environment variable: the bearer token of reward servers and of their clients


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

    algorithm: Literal["grpo", "grpo_guard", "nft", "awm", "dpo", "sft", "rwr"] = "grpo"
    """Policy gradient on the sampled steps (grpo, grpo_guard), or flow matching to the images: dpo the best of a group
    against the worst, sft the best, rwr all by weight."""
    data: Literal["online", "offline"] = "online"
    """Images of the policy under training or, for dpo, sft and rwr, of the model as it was loaded."""
    noise_draws: int = 1
    """Random noise levels at which dpo, sft and rwr learn an image."""
    dpo_beta: float = 100.0
    """How strongly dpo is held to the reference; lower lets it go further."""
    nft_beta: float = 1.0
    """Distance of nft's implicit positive and negative policies from the old policy, as a share of the policy's."""
    awm_clip_range: float = 1.0
    """The ratio of awm is clipped to [1 - awm_clip_range, 1 + awm_clip_range]."""
    old_weight: float = 1.0
    """Weight of awm's squared distance to the velocity of the old policy."""
    old_decay_slope: float = 0.001
    """The old policy of nft and awm keeps a share of itself that grows by this much with each update."""
    old_decay_start: int = 0
    """Updates before that share begins to grow."""
    old_decay_max: float = 0.5
    """Largest share that the old policy keeps of itself."""
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
