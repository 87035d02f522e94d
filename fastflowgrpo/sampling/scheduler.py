"""Flow-GRPO's sampler as a drop-in replacement for the flow-matching Euler scheduler of diffusers."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor

from fastflowgrpo.kernels.sde_step import sde_step
from fastflowgrpo.sampling.coefficients import StepCoefficients, check_dynamics, resolve_log_prob, step_coefficients

# Separates the noise of the steps from an initial noise that was drawn with the same seed.
_STREAM = 0x466C6F77534445


@dataclass
class FlowSDESchedulerOutput(FlowMatchEulerDiscreteSchedulerOutput):
    """The next sample (B, ...) and its log-prob (B,), which is 0 at an ODE step."""

    log_prob: torch.Tensor


@dataclass
class RecordedTrajectory:
    """The K steps that `FlowSDEScheduler` has taken since `set_timesteps`.

    Step i goes from latents[i] to latents[i + 1], with timesteps[i] and log_probs[i]. The lists hold the pipeline's own
    tensors, not copies, so a callback must not edit latents in place. The properties stack them, steps first.
    """

    coefficients: StepCoefficients
    """Coefficients of the whole schedule, ODE outside the window; entry `steps[i]` belongs to step i."""
    log_prob: str
    """Definition of the log-probs: "normalised" or "unnormalised"."""
    steps: list[int] = field(default_factory=list)
    """Index of each step in the schedule: 0, 1, ..., or later ones if the pipeline starts there (image to image)."""
    timestep_list: list[torch.Tensor] = field(default_factory=list, repr=False)
    sample_list: list[torch.Tensor] = field(default_factory=list, repr=False)
    prev_sample_list: list[torch.Tensor] = field(default_factory=list, repr=False)
    log_prob_list: list[torch.Tensor] = field(default_factory=list, repr=False)

    @property
    def latents(self) -> torch.Tensor:
        """(K + 1, B, ...): the initial sample and the sample after each step.

        Raises:
            ValueError: the latents were replaced between two steps; use `samples` and `prev_samples` then.
        """
        for i, (prev_sample, sample) in enumerate(zip(self.prev_sample_list, self.sample_list[1:], strict=False)):
            if prev_sample is not sample:
                raise ValueError(
                    f"the latents were replaced between steps {i} and {i + 1}, by the pipeline or a callback: "
                    "use trajectory.samples and trajectory.prev_samples"
                )
        return torch.stack([*self.sample_list, *self.prev_sample_list[-1:]])

    @property
    def samples(self) -> torch.Tensor:
        """(K, B, ...): the sample that each step started from."""
        return torch.stack(self.sample_list)

    @property
    def prev_samples(self) -> torch.Tensor:
        """(K, B, ...): the sample that each step returned."""
        return torch.stack(self.prev_sample_list)

    @property
    def timesteps(self) -> torch.Tensor:
        """(K,): timestep of each step."""
        return torch.stack(self.timestep_list)

    @property
    def log_probs(self) -> torch.Tensor:
        """(K, B), float32: log-prob of each step, 0 at ODE steps."""
        return torch.stack(self.log_prob_list)

    def append(
        self,
        step: int,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        prev_sample: torch.Tensor,
        log_prob: torch.Tensor,
    ) -> None:
        """Record a step from `sample` to `prev_sample`."""
        self.steps.append(step)
        self.timestep_list.append(torch.as_tensor(timestep))
        self.sample_list.append(sample)
        self.prev_sample_list.append(prev_sample)
        self.log_prob_list.append(log_prob.detach())


class FlowSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """Samples a flow-matching pipeline with an SDE and records the steps and their log-probs (arXiv 2505.05470).

        pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, noise_level=0.7)
        images = pipe(prompt).images
        pipe.scheduler.trajectory.latents, pipe.scheduler.trajectory.log_probs

    The schedule is the parent's. An ODE step is the parent's own step, bit for bit: every step with noise_level=0 or
    dynamics="ode", the steps outside the window, and the last step of `flow_cps`. Put the original scheduler back
    before `pipe.save_pretrained`.

    Args:
        noise_level: a of `flow_sde` and `flow_cps`, eta of `dance_sde`; 0 is the ODE.
        dynamics: "flow_sde", "flow_cps", "dance_sde" or "ode", see `fastflowgrpo.sampling.coefficients`.
        window: (start, size): only steps start, ..., start + size - 1 are stochastic. None: all steps are.
        seed: seed of the steps' noise, which is drawn on the sample's device; the pipeline draws the initial noise.
            Each `set_timesteps`, and so each call of a pipeline, starts from this seed again and gives the same noise.
            With None, each takes a new seed from torch's default generator, which `torch.manual_seed` sets. A
            generator passed to `step`, or a list with one per sample, replaces the seed.
        log_prob: "normalised", "unnormalised", or "auto": unnormalised for `flow_cps`, normalised for the others.

    All other arguments are those of `FlowMatchEulerDiscreteScheduler`. A `flow_shift` in the config (UniPC and
    DPM-Solver schedulers of Wan and SANA) is used as `shift`.

    Raises:
        ValueError: a setting is out of range, or `stochastic_sampling` or `invert_sigmas` is set together with an SDE.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        noise_level: float = 0.7,
        dynamics: str = "flow_sde",
        window: tuple[int, int] | None = None,
        seed: int | None = None,
        log_prob: str = "auto",
    ):
        check_dynamics(dynamics, noise_level)
        self._log_prob = resolve_log_prob(log_prob, dynamics)
        if window is not None and not (isinstance(window, (tuple, list)) and len(window) == 2):
            raise ValueError(f"window {window!r} is not a pair: give (start, size), or None for all steps")
        self._stochastic = dynamics != "ode" and noise_level != 0
        if self._stochastic:
            for name, given in (("stochastic_sampling", stochastic_sampling), ("invert_sigmas", invert_sigmas)):
                if given:
                    raise ValueError(
                        f"{name}=True selects another sampler, which does not combine with {dynamics}: "
                        f"give {name}=False, or noise_level=0 to keep it"
                    )
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        self._trajectory: RecordedTrajectory | None = None
        self._generator: torch.Generator | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, but a config's `flow_shift` (UniPC, DPM-Solver) becomes `shift`."""
        if isinstance(config, dict) and "flow_shift" in config and "shift" not in config:
            kwargs.setdefault("shift", config["flow_shift"])
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def trajectory(self) -> RecordedTrajectory:
        """The steps taken since the last `set_timesteps`."""
        if self._trajectory is None:
            raise ValueError("there is no trajectory yet: run the pipeline, or call set_timesteps before step")
        return self._trajectory

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Sets the parent's schedule, starts a new trajectory and starts from the seed again.

        Raises:
            ValueError: the schedule does not decrease to 0, or the window does not fit it.
        """
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        coefficients = step_coefficients(self.sigmas, self.config.dynamics, self.config.noise_level)
        if self._stochastic and self.config.window is not None:
            coefficients = coefficients.window(*self.config.window)
        self._trajectory = RecordedTrajectory(coefficients, self._log_prob)
        # Python numbers, so that a step waits for no tensor
        self._coefficients = list(
            zip(coefficients.c_x.tolist(), coefficients.c_v.tolist(), coefficients.std.tolist(), strict=True)
        )
        self._generator = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowSDESchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Takes one step from `timestep`, computes its log-prob and records both.

        Args:
            model_output: (B, ...), the velocity after guidance.
            timestep: one of `scheduler.timesteps`.
            sample: (B, ...), the current sample.
            generator: draws the noise instead of the scheduler's seed.
            s_churn, s_tmin, s_tmax, s_noise: they have no effect, as in the parent.
            per_token_timesteps: as in the parent, but only at ODE steps.
            return_dict: return `FlowSDESchedulerOutput` and not the tuple (prev_sample, log_prob).

        Returns:
            The next sample (B, ...), rounded to the dtype of `model_output`, and its log-prob, float32 (B,).
        """
        trajectory = self.trajectory
        if not torch.is_floating_point(torch.as_tensor(timestep)):
            raise ValueError(f"timestep {timestep} is an integer, perhaps an index: give one of scheduler.timesteps")
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        std = self._coefficients[index][2]
        if std == 0:
            prev_sample = super().step(
                model_output,
                timestep,
                sample,
                s_churn=s_churn,
                s_tmin=s_tmin,
                s_tmax=s_tmax,
                s_noise=s_noise,
                generator=generator,
                per_token_timesteps=per_token_timesteps,
                return_dict=False,
            )[0]
            log_prob = torch.zeros(len(sample), device=sample.device)
        elif per_token_timesteps is not None:
            raise ValueError(f"per_token_timesteps does not combine with {self.config.dynamics}: use noise_level=0")
        else:
            prev_sample, log_prob = self._stochastic_step(model_output, sample, index, generator)
            self._step_index = index + 1
        trajectory.append(index, timestep, sample, prev_sample, log_prob)
        if not return_dict:
            return prev_sample, log_prob
        return FlowSDESchedulerOutput(prev_sample=prev_sample, log_prob=log_prob)

    def _stochastic_step(
        self,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        index: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        c_x, c_v, std = self._coefficients[index]
        noise, log_prob = self._noise(sample, generator), self.trajectory.log_prob
        return sde_step(velocity, sample, c_x, c_v, std, noise=noise, dtype=velocity.dtype, log_prob=log_prob)

    def _noise(self, sample: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        if generator is None:
            if self._generator is None:
                seed = self.config.seed
                if seed is None:
                    seed = int(torch.randint(2**63 - 1, ()))  # on the CPU: no wait for the device
                self._generator = torch.Generator(sample.device).manual_seed(seed ^ _STREAM)
            generator = self._generator
        return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
