"""What the demo draws: the images and scores of an evaluation, checkpoints to choose from, and limits."""

from dataclasses import replace

import pytest
import torch
from support.demo_runs import SHAPES, request, save_run
from support.pipelines import tiny_wan_pipeline

from fastflowgrpo.config import Config, DemoConfig, PolicyConfig, parse_demo
from fastflowgrpo.demonstration.examples import demo_prompts, spread
from fastflowgrpo.demonstration.generation import MAX_PROMPT, Demo
from fastflowgrpo.errors import UserError
from fastflowgrpo.evaluation.sampling import sample_and_score
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.trained import load_trained
from fastflowgrpo.prompts import TAGS, Prompt
from fastflowgrpo.rewards import build_rewards
from fastflowgrpo.scoring.pipeline import Scoring
from fastflowgrpo.shapes import scenes


class Cancelled(Exception):
    pass


def load(config: DemoConfig) -> Demo:
    return Demo.load(config, demo_prompts(config)[1])


def pixels(demo, **changes):
    """The base model's and the trained images."""
    columns = demo.generate(request(**changes)).columns
    return [images.pixels for images in columns.values()]


def red(batch):
    return batch.images[:, 0].float().mean((1, 2))


def broken(batch):
    raise RuntimeError("no <b>luck</b>")


def unset(batch):
    raise UserError("set a key")


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory):
    """The bundled model, trained in full: two checkpoints."""
    return save_run(tmp_path_factory.mktemp("shapes") / "run", Config(), steps=(2, 10))


@pytest.fixture(scope="module")
def shapes_demo(shapes_run):
    return load(DemoConfig(run=str(shapes_run), rewards=SHAPES))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, tiny_sd3_folder):
    policy = PolicyConfig(lora_rank=4, max_sequence_length=8)
    config = Config(model=str(tiny_sd3_folder), policy=policy)
    return save_run(tmp_path_factory.mktemp("lora") / "run", config, steps=(1, 2))


def test_both_columns_are_those_of_an_evaluation(shapes_run, shapes_demo):
    checkpoint = shapes_run / "checkpoints/checkpoint-10"
    policy = load_trained("shapes", checkpoint, PolicyConfig())
    prompts, index = scenes.eval_prompts(), 5
    scoring = Scoring(build_rewards(SHAPES), policy.decode, policy.device)

    def evaluated():
        return sample_and_score(
            policy,
            EmbeddingCache(policy),
            scoring,
            [(index, prompts[index])],
            policy.latent_shape(None, None),
            num_steps=4,
            images_per_prompt=3,
            batch_size=3,
            guidance_scale=2.0,
        )

    with policy.reference():
        base = evaluated()
    trained = evaluated()
    assert not torch.equal(base.images, trained.images)
    answer = shapes_demo.generate(
        request(prompt=f" {prompts[index].text}\n", seed=index, guidance_scale=2.0, rewards=list(SHAPES))
    )
    for images, samples in zip(answer.columns.values(), (base, trained), strict=True):
        assert torch.equal(images.pixels, samples.images)
        assert images.scores.keys() == samples.scores.details.keys()
        for name, values in images.scores.items():
            assert torch.equal(values, samples.scores.details[name]), name
    assert list(answer.columns) == ["base", "trained"]
    assert answer.not_scored == {}


@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps", "dance_sde"])
def test_a_stochastic_sampler_without_noise_is_the_ode(shapes_demo, dynamics):
    ode = pixels(shapes_demo, dynamics="ode", noise_level=0.7)
    for images, expected in zip(pixels(shapes_demo, dynamics=dynamics, noise_level=0.0), ode, strict=True):
        assert torch.equal(images, expected)
    noisy = pixels(shapes_demo, dynamics=dynamics, noise_level=0.7)
    assert not torch.equal(noisy[0], ode[0])
    assert torch.equal(noisy[0], pixels(shapes_demo, dynamics=dynamics, noise_level=0.7)[0])


def test_images_depend_on_the_seed_and_not_on_their_number(shapes_demo):
    three, two = pixels(shapes_demo), pixels(shapes_demo, num_images=2)
    assert (three[0][:2].int() - two[0].int()).abs().max() <= 1  # another batch rounds differently
    assert not torch.equal(three[0], pixels(shapes_demo, seed=1)[0])


def test_one_step_is_an_ode_step(shapes_demo):
    one = pixels(shapes_demo, num_steps=1, dynamics="flow_sde")
    assert torch.equal(one[0], pixels(shapes_demo, num_steps=1)[0])


@pytest.mark.parametrize("run", ["shapes_run", "lora_run"])
def test_checkpoints_can_be_chosen_in_any_order(request, run):
    folder = request.getfixturevalue(run)
    demo = load(parse_demo(["--run", str(folder)]))
    names = demo.checkpoints()
    assert names == [f"checkpoint-{step}" for step in sorted(int(name.split("-")[1]) for name in names)]
    assert demo.loaded == names[-1]
    drawn = {name: pixels(demo, checkpoint=name) for name in (*names, names[0])}
    (base, first), (other_base, second) = drawn.values()
    assert torch.equal(base, other_base)
    assert not torch.equal(first, second)
    assert not torch.equal(base, first)
    alone = load(parse_demo(["--run", str(folder), "--checkpoint", str(folder / "checkpoints" / names[0])]))
    assert alone.checkpoints() == names[:1]
    assert torch.equal(pixels(alone, checkpoint=names[0])[1], first)


def test_a_lora_that_no_run_has_written(lora_run):
    lora, of_run = str(lora_run / "checkpoints/checkpoint-2"), parse_demo(["--run", str(lora_run)])
    demo = load(replace(of_run, run=None, prompts="general", policy=replace(of_run.policy, lora=lora, lora_rank=None)))
    assert demo.checkpoints() == [lora]
    of_run = load(of_run)
    for images, expected in zip(pixels(demo, checkpoint=lora), pixels(of_run, checkpoint="checkpoint-2"), strict=True):
        assert torch.equal(images, expected)


def test_a_model_without_trained_weights(shapes_demo):
    demo = load(DemoConfig(rewards=SHAPES))
    assert demo.checkpoints() == []
    (base,) = pixels(demo, checkpoint=None)
    assert torch.equal(base, pixels(shapes_demo)[0])


def test_a_new_checkpoint_can_be_chosen_and_a_deleted_one_not(tmp_path):
    run = save_run(tmp_path / "run", Config(), steps=(1,))
    demo = load(DemoConfig(run=str(run)))
    folder = run / "checkpoints/checkpoint-1"
    before = pixels(demo, checkpoint="checkpoint-1")
    folder.rename(run / "checkpoints/checkpoint-3")
    assert demo.checkpoints() == ["checkpoint-3"]
    assert torch.equal(pixels(demo, checkpoint="checkpoint-3")[1], before[1])
    for name in ("checkpoint-1", "../../elsewhere"):
        with pytest.raises(UserError, match="reload the page"):
            demo.generate(request(checkpoint=name))
    (run / "checkpoints/checkpoint-3").rename(run / "gone")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(DemoConfig(run=str(run)))


def test_a_damaged_checkpoint_leaves_the_others_usable(shapes_run, tmp_path):
    run = save_run(tmp_path / "run", Config(), steps=(1, 2))
    demo = load(DemoConfig(run=str(run)))
    expected = pixels(demo, checkpoint="checkpoint-2")
    weights = run / "checkpoints/checkpoint-1/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="checkpoint-1"):
        demo.generate(request(checkpoint="checkpoint-1"))
    assert torch.equal(pixels(demo, checkpoint="checkpoint-2")[1], expected[1])


def test_a_request_can_be_ended_after_any_step(shapes_demo):
    expected, seen = pixels(shapes_demo, checkpoint="checkpoint-10"), []

    def end(done, total):
        seen.append((done, total))
        if done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        shapes_demo.generate(request(checkpoint="checkpoint-10"), end)
    assert seen == [(0, 8), (1, 8), (2, 8), (3, 8)]
    for images, other in zip(pixels(shapes_demo, checkpoint="checkpoint-10"), expected, strict=True):
        assert torch.equal(images, other)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_images": 9}, "number of images: must be from 1 to 8, got 9"),
        ({"num_images": 0}, "number of images: must be from 1 to 8, got 0"),
        ({"num_steps": 101}, "steps: must be from 1 to 100, got 101"),
        ({"seed": -1}, "seed: must be from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed: must be from 0"),
        ({"guidance_scale": float("nan")}, "guidance: must be from 0 to 100, got nan"),
        ({"checkpoint": None}, "checkpoint: choose one of checkpoint-2, checkpoint-10"),
        ({"prompt": " \n"}, "prompt: is empty"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, "prompt: has 1001 characters, at most 1000 are allowed"),
        ({"dynamics": "sde"}, "unknown dynamics 'sde'"),
        ({"dynamics": "flow_cps", "noise_level": 1.1}, "noise_level 1.1 is out of range"),
        ({"rewards": ["geneval", "os:system"]}, "rewards: no os:system, there are geneval, jpeg_compressibility"),
    ],
)
def test_limits(shapes_demo, changes, message):
    with pytest.raises(UserError) as error:
        shapes_demo.generate(request(**changes))
    assert message in str(error.value)


def test_a_reward_that_cannot_score_says_why_and_the_others_score():
    rewards = dict.fromkeys(["geneval", "ocr", *(f"test_generation:{name}" for name in ("red", "broken", "unset"))], 1)
    demo = load(DemoConfig(rewards=rewards))
    for _ in range(2):
        answer = demo.generate(request(prompt="a photo of a dragon", rewards=list(rewards), checkpoint=None))
        base = answer.columns["base"]
        assert torch.equal(base.scores["test_generation:red"], base.pixels[:, 0].float().mean((1, 2)))
        assert base.scores["test_generation:broken"].isnan().all()
        assert set(base.scores) == {"test_generation:red", "test_generation:broken"}
        assert "has no GenEval metadata" in answer.not_scored["geneval"]
        assert "has no text in double quotes" in answer.not_scored["ocr"]
        assert answer.not_scored["test_generation:broken"] == "RuntimeError: no <b>luck</b>"
        assert answer.not_scored["test_generation:unset"] == "rewards.test_generation:unset: set a key"
    none = demo.generate(request(rewards=[], checkpoint=None))
    assert (none.columns["base"].scores, none.not_scored) == ({}, {})


def test_of_a_video_the_middle_frame_is_shown(tmp_path):
    tiny_wan_pipeline().save_pretrained(tmp_path / "wan")
    config = DemoConfig(model=str(tmp_path / "wan"), rewards="test_generation:red", height=16, width=16, num_frames=5)
    config.policy.max_sequence_length = 8
    demo = load(config)
    base = demo.generate(request(checkpoint=None, rewards=["test_generation:red"])).columns["base"]
    assert base.pixels.shape == (3, 3, 16, 16)
    assert base.scores["test_generation:red"].isfinite().all()


def test_examples_are_of_the_three_tasks_or_of_the_bundled_world(tmp_path, tiny_sd3_folder):
    examples, known = demo_prompts(DemoConfig())
    (own,) = examples.values()
    assert [prompt.metadata["tag"] for prompt in own] == [tag for tag in TAGS for _ in range(2)]
    assert all(known[prompt.text] == prompt for prompt in [*scenes.train_prompts(), *scenes.eval_prompts()])

    (tmp_path / "mine.txt").write_text("a cat\na dog\na cat\n")
    config = DemoConfig(model=str(tiny_sd3_folder), prompts=str(tmp_path / "mine.txt"))
    examples, _ = demo_prompts(config)
    assert list(examples) == ["Prompts of this model", "GenEval", "OCR", "PickScore and other preferences"]
    assert [prompt.text for prompt in examples["Prompts of this model"]] == ["a cat", "a dog"]
    assert {prompt.metadata["tag"] for prompt in examples["GenEval"]} == set(TAGS)
    assert all('"' in prompt.text for prompt in examples["OCR"])
    with pytest.raises(UserError, match=r"^prompts: "):
        demo_prompts(DemoConfig(prompts=str(tmp_path / "none.txt")))


def test_examples_are_spread_evenly():
    prompts = [Prompt(str(i)) for i in range(12)]
    assert [prompt.text for prompt in spread(prompts)] == ["0", "2", "4", "6", "8", "10"]
