import copy
import inspect

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, ZImagePipeline
from support.no_sync import NoSynchronisation
from support.pipelines import (
    tiny_flux2_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)

from fastflowgrpo.kernels.sde_step import sde_step
from fastflowgrpo.sampling.coefficients import DYNAMICS, step_coefficients
from fastflowgrpo.sampling.scheduler import FlowSDEScheduler

SHAPE = (3, 4, 8, 8)
STOCHASTIC = [name for name in DYNAMICS if name != "ode"]


def randn(seed, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sample_with(scheduler, num_steps=6, dtype=torch.float32, **kwargs):
    """The loop of a pipeline with a made-up model; returns the final sample."""
    scheduler.set_timesteps(num_steps)
    sample = randn(0, dtype=dtype)
    for t in scheduler.timesteps:
        velocity = (0.5 * sample - torch.sin(3 * sample + t / 1000)).to(dtype)
        sample = scheduler.step(velocity, t, sample, return_dict=False, **kwargs)[0]
    return sample


# the contract of diffusers


def test_step_has_the_parents_arguments_in_order():
    parent, ours = (
        list(inspect.signature(cls.step).parameters) for cls in (FlowMatchEulerDiscreteScheduler, FlowSDEScheduler)
    )
    assert ours[: len(parent)] == parent
    assert "eta" not in ours


def test_init_repeats_the_parents_arguments():
    parent, ours = (
        inspect.signature(cls.__init__).parameters for cls in (FlowMatchEulerDiscreteScheduler, FlowSDEScheduler)
    )
    for name, parameter in parent.items():
        assert ours[name].default == parameter.default, name


PARENT_CONFIG = {
    "num_train_timesteps": 500,
    "shift": 2.7,
    "use_dynamic_shifting": True,
    "base_shift": 0.4,
    "max_shift": 1.2,
    "base_image_seq_len": 128,
    "max_image_seq_len": 2048,
    "shift_terminal": 0.1,
    "use_karras_sigmas": True,
    "time_shift_type": "linear",
}


def test_from_config_keeps_the_parents_settings_and_gives_them_back():
    original = FlowMatchEulerDiscreteScheduler(**PARENT_CONFIG)
    scheduler = FlowSDEScheduler.from_config(original.config, noise_level=0.4, window=(1, 2))
    assert {name: scheduler.config[name] for name in PARENT_CONFIG} == PARENT_CONFIG
    assert scheduler.config.noise_level == 0.4
    assert scheduler.shift == 2.7
    restored = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    assert {name: restored.config[name] for name in PARENT_CONFIG} == PARENT_CONFIG
    again = FlowSDEScheduler.from_config(scheduler.config, seed=1)
    assert (again.config.noise_level, again.config.window, again.config.seed) == (0.4, (1, 2), 1)


def test_save_and_load(tmp_path):
    scheduler = FlowSDEScheduler(shift=3.0, noise_level=0.4, dynamics="flow_cps", window=(1, 2), seed=3)
    scheduler.save_pretrained(tmp_path)
    loaded = FlowSDEScheduler.from_pretrained(tmp_path)
    assert torch.equal(sample_with(loaded), sample_with(scheduler))
    assert torch.equal(loaded.trajectory.log_probs, scheduler.trajectory.log_probs)


def test_flow_shift_of_other_schedulers_becomes_shift():
    other = UniPCMultistepScheduler(flow_shift=5.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    assert FlowSDEScheduler.from_config(other.config).shift == 5.0
    assert FlowSDEScheduler.from_config(other.config, shift=2.0).shift == 2.0
    # a shift that the caller chose survives the next from_config
    assert FlowSDEScheduler.from_config(FlowSDEScheduler.from_config(other.config, shift=2.0).config).shift == 2.0


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({"shift": 3.0}, {"num_inference_steps": 10}),
        ({"shift": 1.7}, {"num_inference_steps": 1}),
        ({"shift": 3.0}, {"sigmas": [1.0, 0.7, 0.2]}),
        ({}, {"sigmas": [0.9, 0.5], "timesteps": [900.0, 450.0]}),
        ({"use_dynamic_shifting": True}, {"num_inference_steps": 4, "mu": 0.9}),
        (
            {"use_dynamic_shifting": True, "time_shift_type": "linear"},
            {"sigmas": list(np.linspace(1, 0.25, 4)), "mu": 0.9},
        ),
        ({"use_karras_sigmas": True}, {"num_inference_steps": 5}),
        ({"use_exponential_sigmas": True}, {"num_inference_steps": 5}),
        ({"shift_terminal": 0.02}, {"num_inference_steps": 5}),
    ],
)
def test_schedule_is_the_parents(config, arguments):
    original = FlowMatchEulerDiscreteScheduler(**config)
    original.set_timesteps(**arguments)
    scheduler = FlowSDEScheduler.from_config(original.config)
    scheduler.set_timesteps(**arguments)
    assert torch.equal(scheduler.sigmas, original.sigmas)
    assert torch.equal(scheduler.timesteps, original.timesteps)
    assert scheduler.num_inference_steps == original.num_inference_steps
    assert torch.equal(scheduler.trajectory.coefficients.std, step_coefficients(original.sigmas).std)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config", [{"dynamics": "ode"}, *({"dynamics": name, "noise_level": 0} for name in STOCHASTIC)]
)
def test_ode_is_the_parent_bit_for_bit(config, dtype):
    state = torch.get_rng_state()
    # the window does not fit, and has no meaning here
    scheduler = FlowSDEScheduler(shift=3.0, window=(5, 3), **config)
    ours = sample_with(scheduler, dtype=dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, sample_with(FlowMatchEulerDiscreteScheduler(shift=3.0), dtype=dtype))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(scheduler.trajectory.log_probs, torch.zeros(6, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_outside_the_window_are_the_parents(dtype):
    scheduler = FlowSDEScheduler(shift=3.0, window=(2, 2))
    parent = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sample_with(scheduler, dtype=dtype)
    parent.set_timesteps(6)
    trajectory = scheduler.trajectory
    for i, t in enumerate(parent.timesteps):
        sample = trajectory.latents[i]
        velocity = (0.5 * sample - torch.sin(3 * sample + t / 1000)).to(dtype)
        expected = parent.step(velocity, t, sample).prev_sample
        assert torch.equal(trajectory.latents[i + 1], expected) == (i not in (2, 3))
    assert (trajectory.log_probs != 0).all(dim=1).tolist() == [False, False, True, True, False, False]
    assert (trajectory.coefficients.std > 0).tolist() == [False, False, True, True, False, False]


def test_last_step_of_flow_cps_is_the_odes():
    scheduler = FlowSDEScheduler(dynamics="flow_cps")
    sample_with(scheduler)
    assert (scheduler.trajectory.log_probs != 0).all(dim=1).tolist() == [True] * 5 + [False]
    assert scheduler.trajectory.log_prob == "unnormalised"


@pytest.mark.parametrize("dynamics", STOCHASTIC)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_step_is_sde_step_with_the_output_in_the_models_dtype(dtypes, dynamics):
    velocity, sample = (randn(i, dtype=dtype) for i, dtype in enumerate(dtypes))
    scheduler = FlowSDEScheduler(shift=3.0, dynamics=dynamics)
    scheduler.set_timesteps(6)
    output = scheduler.step(velocity, scheduler.timesteps[0], sample, generator=torch.Generator().manual_seed(5))
    c = step_coefficients(scheduler.sigmas, dynamics).at(torch.zeros(3, dtype=torch.int64))
    kind = scheduler.trajectory.log_prob
    expected, _ = sde_step(velocity, sample, c.c_x, c.c_v, c.std, noise=randn(5), dtype=velocity.dtype)
    _, log_prob = sde_step(velocity, sample, c.c_x, c.c_v, c.std, prev_sample=expected, log_prob=kind)
    assert output.prev_sample.dtype == velocity.dtype
    assert torch.equal(output.prev_sample, expected)
    assert torch.equal(output.log_prob, log_prob)
    assert torch.equal(scheduler.trajectory.log_probs[0], log_prob)


def test_list_of_generators_draws_each_sample_alone():
    velocity, sample = randn(1), randn(0)
    scheduler = FlowSDEScheduler(shift=3.0)

    def first_step(**kwargs):
        scheduler.set_timesteps(6)
        return scheduler.step(velocity, scheduler.timesteps[0], sample, **kwargs).prev_sample

    together = first_step(generator=[torch.Generator().manual_seed(i) for i in (4, 5, 6)])
    other = first_step(generator=[torch.Generator().manual_seed(i) for i in (7, 5, 6)])
    assert not torch.equal(together[0], other[0])
    assert torch.equal(together[1:], other[1:])


def test_seed_repeats_and_none_does_not():
    seeded, other, fresh = FlowSDEScheduler(seed=1), FlowSDEScheduler(seed=2), FlowSDEScheduler()
    first = sample_with(seeded)
    assert torch.equal(sample_with(seeded), first)
    assert torch.equal(sample_with(FlowSDEScheduler.from_config(other.config, seed=1)), first)
    assert not torch.equal(sample_with(other), first)
    assert not torch.equal(sample_with(fresh), sample_with(fresh))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = sample_with(fresh)
        torch.manual_seed(3)
        assert torch.equal(sample_with(fresh), first)


def test_a_seeded_run_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    sample_with(FlowSDEScheduler(seed=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [0, None])
def test_step_noise_is_not_the_initial_noise_of_the_same_seed(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scheduler = FlowSDEScheduler(seed=seed)
        scheduler.set_timesteps(6)
        initial = randn(0)
        zeros = torch.zeros(SHAPE)
        noise = scheduler.step(zeros, scheduler.timesteps[0], zeros).prev_sample
    correlation = torch.corrcoef(torch.stack([initial.flatten(), noise.flatten()]))[0, 1]
    assert abs(correlation) < 0.15


def test_begin_index_is_kept():
    """Image-to-image pipelines set it; the step is then found by its index, not by its timestep."""
    scheduler = FlowSDEScheduler(shift=3.0, seed=0)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    sample = randn(0)
    for t in scheduler.timesteps[2:]:
        sample = scheduler.step(randn(1), t, sample).prev_sample
    trajectory = scheduler.trajectory
    assert trajectory.steps == [2, 3, 4, 5]
    assert torch.equal(trajectory.timesteps, scheduler.timesteps[2:])
    c = trajectory.coefficients.at(torch.full((3,), 2))
    _, log_prob = sde_step(randn(1), randn(0), c.c_x, c.c_v, c.std, prev_sample=trajectory.latents[1])
    assert torch.equal(trajectory.log_probs[0], log_prob)


def test_timestep_is_looked_up_once(monkeypatch):
    looked_up = []
    find = FlowSDEScheduler.index_for_timestep
    monkeypatch.setattr(
        FlowSDEScheduler, "index_for_timestep", lambda self, *args: looked_up.append(args) or find(self, *args)
    )
    sample_with(FlowSDEScheduler())
    assert len(looked_up) == 1


@pytest.mark.parametrize("config", [{}, {"window": (1, 2)}, {"dynamics": "flow_cps"}, {"noise_level": 0}])
def test_steps_do_not_wait_for_the_device(config):
    scheduler = FlowSDEScheduler(seed=0, **config)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    sample = randn(0)
    with NoSynchronisation():
        for t in scheduler.timesteps.unbind():
            sample = scheduler.step(randn(1), t, sample).prev_sample
        assert scheduler.trajectory.latents.shape == (7, *SHAPE)
    with NoSynchronisation(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        sample.sum().item()


def test_inputs_are_not_mutated():
    velocity, sample = randn(1), randn(0)
    scheduler = FlowSDEScheduler()
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        scheduler.step(velocity, t, sample)
    assert torch.equal(velocity, randn(1))
    assert torch.equal(sample, randn(0))


def test_set_timesteps_starts_a_new_trajectory():
    scheduler = FlowSDEScheduler()
    sample_with(scheduler)
    before = scheduler.trajectory
    scheduler.set_timesteps(3)
    assert scheduler.trajectory.steps == []
    assert before.latents.shape == (7, *SHAPE)


def test_recorded_log_probs_hold_no_graph():
    scheduler = FlowSDEScheduler()
    scheduler.set_timesteps(2)
    output = scheduler.step(randn(1).requires_grad_(), scheduler.timesteps[0], randn(0))
    assert output.log_prob.requires_grad
    assert not scheduler.trajectory.log_probs.requires_grad


def test_replaced_latents_are_noticed():
    scheduler = FlowSDEScheduler()
    scheduler.set_timesteps(3)
    sample = randn(0)
    for t in scheduler.timesteps:
        sample = scheduler.step(randn(1), t, sample).prev_sample + 1
    trajectory = scheduler.trajectory
    with pytest.raises(ValueError, match="latents were replaced between steps 0 and 1"):
        _ = trajectory.latents
    assert torch.equal(trajectory.samples[1:], trajectory.prev_samples[:-1] + 1)


def test_copies_are_independent():
    scheduler = FlowSDEScheduler(seed=0)
    sample_with(scheduler)
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(2)
    assert len(scheduler.trajectory.steps) == 6


def test_stochastic_sampling_and_per_token_timesteps_pass_through_the_ode():
    config = {"stochastic_sampling": True, "shift": 3.0}
    ours, parents = (
        sample_with(scheduler, generator=torch.Generator().manual_seed(0))
        for scheduler in (FlowSDEScheduler(noise_level=0, **config), FlowMatchEulerDiscreteScheduler(**config))
    )
    assert torch.equal(ours, parents)

    velocity, sample = randn(1, (2, 5, 4)), randn(0, (2, 5, 4))
    per_token = torch.tensor([1000.0, 800, 600, 400, 200]).expand(2, 5)
    outputs = []
    for scheduler in (FlowSDEScheduler(noise_level=0), FlowMatchEulerDiscreteScheduler()):
        scheduler.set_timesteps(6)
        outputs.append(
            scheduler.step(velocity, scheduler.timesteps[0], sample, per_token_timesteps=per_token).prev_sample
        )
    assert torch.equal(*outputs)


def test_inverted_sigmas_pass_through_the_ode():
    ours, parents = (
        sample_with(scheduler)
        for scheduler in (
            FlowSDEScheduler(invert_sigmas=True, noise_level=0),
            FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        )
    )
    assert torch.equal(ours, parents)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dynamics": "sde"}, "unknown dynamics 'sde': choose one of flow_sde"),
        ({"dynamics": "flow_cps", "noise_level": 1.2}, "noise_level 1.2 is out of range"),
        ({"log_prob": "sum"}, "unknown log_prob 'sum': choose one of auto"),
        ({"window": (1, 2, 3)}, r"window \(1, 2, 3\) is not a pair: give \(start, size\)"),
        ({"window": 3}, "window 3 is not a pair"),
        ({"stochastic_sampling": True}, "stochastic_sampling=True .* give stochastic_sampling=False, or noise_level=0"),
        ({"invert_sigmas": True}, "invert_sigmas=True .* give invert_sigmas=False, or noise_level=0"),
    ],
)
def test_settings_that_make_no_sense(config, message):
    with pytest.raises(ValueError, match=message):
        FlowSDEScheduler(**config)


def test_errors_of_use():
    scheduler = FlowSDEScheduler(window=(4, 3))
    with pytest.raises(ValueError, match="there is no trajectory yet: run the pipeline, or call set_timesteps"):
        scheduler.step(randn(1), 1000.0, randn(0))
    with pytest.raises(ValueError, match="window of 3 steps from step 4 does not fit a schedule of 6 steps"):
        scheduler.set_timesteps(6)
    scheduler.set_timesteps(7)
    scheduler.set_begin_index(4)
    for timestep in (4, torch.tensor(4)):
        with pytest.raises(ValueError, match="timestep 4 is an integer, perhaps an index"):
            scheduler.step(randn(1), timestep, randn(0))
    with pytest.raises(ValueError, match="per_token_timesteps does not combine with flow_sde: use noise_level=0"):
        scheduler.step(randn(1), scheduler.timesteps[4], randn(0), per_token_timesteps=torch.ones(3, 8))
    assert scheduler.trajectory.steps == []


# unmodified pipelines

PROMPTS = ["a red circle", "two green squares"]
GUIDANCE = 4.5


def sd3_velocity(transformer, call, sample, timestep):
    call |= {"hidden_states": torch.cat([sample] * 2), "timestep": timestep.expand(4)}
    uncond, velocity = transformer(**call)[0].chunk(2)
    return uncond + GUIDANCE * (velocity - uncond)


def flux_velocity(transformer, call, sample, timestep):
    call |= {"hidden_states": sample, "timestep": timestep.expand(2).to(sample.dtype) / 1000}
    return transformer(**call)[0]


def qwen_velocity(transformer, call, sample, timestep):
    """From the calls for both prompts: guided, then scaled back to the conditional norm."""
    velocity, uncond = (flux_velocity(transformer, one, sample, timestep) for one in call)
    guided = uncond + GUIDANCE * (velocity - uncond)
    return guided * (torch.norm(velocity, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))


def wan_velocity(transformer, call, sample, timestep):
    inputs = {"hidden_states": sample.to(transformer.dtype), "timestep": timestep.expand(2)}
    velocity, uncond = (transformer(**one | inputs)[0] for one in call)
    return uncond + GUIDANCE * (velocity - uncond)


def z_image_velocity(transformer, call, sample, timestep):
    latents = sample.to(transformer.dtype).repeat(2, 1, 1, 1).unsqueeze(2)
    call |= {"x": list(latents), "t": (1000 - timestep.expand(4)) / 1000}
    positive, negative = torch.stack(transformer(**call)[0]).float().chunk(2)
    return -(positive + GUIDANCE * (positive - negative)).squeeze(2)


def wan_with_euler():
    """Wan's pipeline with an Euler scheduler, which ours replaces; its own scheduler is UniPC."""
    pipe = tiny_wan_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
    return pipe


# the pipeline, its guided velocity, the calls of the transformer in a step, arguments
PIPELINES = {
    "sd3": (tiny_sd3_pipeline, sd3_velocity, 1, {}),
    "flux": (tiny_flux_pipeline, flux_velocity, 1, {"height": 16, "width": 16}),
    "qwen": (
        tiny_qwen_image_pipeline,
        qwen_velocity,
        2,
        {"height": 16, "width": 16, "true_cfg_scale": GUIDANCE, "negative_prompt": ["", ""], "guidance_scale": None},
    ),
    "wan": (wan_with_euler, wan_velocity, 2, {"height": 16, "width": 16, "num_frames": 3}),
    "zimage": (tiny_z_image_pipeline, z_image_velocity, 1, {"height": 16, "width": 16}),
    "flux2": (tiny_flux2_pipeline, flux_velocity, 1, {"height": 16, "width": 16}),
}


@pytest.fixture(params=PIPELINES, scope="module")
def pipeline(request):
    """A pipeline, how to evaluate its transformer, and the arguments of a call."""
    build, velocity, calls, arguments = PIPELINES[request.param]
    common = {"guidance_scale": GUIDANCE, "max_sequence_length": 16, "num_inference_steps": 5, "output_type": "latent"}
    return build(), (velocity, calls), {**common, **arguments}


def generate(pipeline, scheduler, **kwargs):
    pipe, _, arguments = pipeline
    original, pipe.scheduler = pipe.scheduler, scheduler(pipe.scheduler)
    try:
        output = pipe(prompt=list(PROMPTS), generator=torch.Generator().manual_seed(0), **{**arguments, **kwargs})
        return output.frames if isinstance(pipe, WanPipeline) else output.images, pipe.scheduler
    finally:
        pipe.scheduler = original


def drop_in(**settings):
    return lambda original: FlowSDEScheduler.from_config(original.config, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipeline_without_noise_is_the_original(pipeline, dtype):
    pipe = pipeline[0]
    pipe.to(dtype)
    try:
        expected, _ = generate(pipeline, lambda original: original, output_type="pt")
        ours, scheduler = generate(pipeline, drop_in(noise_level=0), output_type="pt")
    finally:
        pipe.to(torch.float32)
    assert torch.equal(ours, expected)
    kept = torch.float32 if isinstance(pipe, ZImagePipeline) else dtype  # Z-Image converts each velocity
    assert scheduler.trajectory.prev_sample_list[-1].dtype == kept


@pytest.mark.parametrize("settings", [{}, {"dynamics": "flow_cps"}, {"dynamics": "dance_sde"}, {"window": (1, 2)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipeline_replayed_from_its_trajectory_has_the_same_log_probs(pipeline, dtype, settings):
    pipe, (velocity, per_step), _ = pipeline
    pipe.to(dtype)
    calls = []
    names = list(inspect.signature(pipe.transformer.forward).parameters)
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(dict(zip(names, args, strict=False)) | kwargs), with_kwargs=True
    )
    try:
        latents, scheduler = generate(pipeline, drop_in(seed=0, **settings))
        hook.remove()
        trajectory = scheduler.trajectory
        replayed = []
        for i in range(len(calls) // per_step):
            call = calls[i] if per_step == 1 else calls[per_step * i : per_step * (i + 1)]
            c = trajectory.coefficients.at(torch.full((2,), trajectory.steps[i]))
            _, log_prob = sde_step(
                velocity(pipe.transformer, call, trajectory.latents[i], trajectory.timesteps[i]),
                trajectory.latents[i],
                c.c_x,
                c.c_v,
                c.std,
                prev_sample=trajectory.latents[i + 1],
                log_prob=trajectory.log_prob,
            )
            replayed.append(log_prob)
    finally:
        hook.remove()
        pipe.to(torch.float32)
    assert torch.equal(trajectory.latents[-1], latents)
    assert torch.equal(trajectory.timesteps, scheduler.timesteps)
    assert trajectory.log_probs.shape == (5, 2)
    assert torch.equal(torch.stack(replayed), trajectory.log_probs)
    assert trajectory.log_probs[1].abs().min() > 0


def test_wans_own_scheduler_is_replaced_with_the_same_shift():
    pipe = tiny_wan_pipeline()
    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, seed=0)
    pipe(PROMPTS[0], height=16, width=16, num_frames=3, num_inference_steps=5, max_sequence_length=16)
    trajectory = pipe.scheduler.trajectory
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(5)
    assert torch.equal(trajectory.timesteps, euler.timesteps)
    assert trajectory.log_probs.isfinite().all()


def test_pipeline_with_a_callback(pipeline):
    seen = []

    def record(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {}

    plain, _ = generate(pipeline, drop_in(seed=0))
    latents, scheduler = generate(pipeline, drop_in(seed=0), callback_on_step_end=record)
    assert torch.equal(latents, plain)
    assert torch.equal(scheduler.trajectory.latents[1:], torch.stack(seen))


def test_pipeline_decodes_and_varies(pipeline):
    images, scheduler = generate(pipeline, drop_in(), output_type="pt")
    others, _ = generate(pipeline, drop_in(), output_type="pt")
    assert images.shape in ((2, 3, 16, 16), (2, 3, 3, 16, 16))
    assert images.isfinite().all()
    assert not torch.equal(images, others)
    assert scheduler.trajectory.log_probs.isfinite().all()


def test_pipeline_saves_with_its_original_scheduler_back(tmp_path):
    pipe = tiny_sd3_pipeline()
    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is FlowMatchEulerDiscreteScheduler
    assert loaded.scheduler.shift == 3.0
