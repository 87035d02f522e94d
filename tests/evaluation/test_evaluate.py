"""``python -m fastflowgrpo.evaluate``, on checkpoints of short runs."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from PIL import Image
from safetensors.torch import load_file, save_file
from support.pipelines import tiny_sd3_pipeline
from support.reward_models import clip_folder

from fastflowgrpo import train
from fastflowgrpo.config import parse_evaluation
from fastflowgrpo.evaluate import main
from fastflowgrpo.evaluation import comparison
from fastflowgrpo.evaluation.sampling import sample_and_score
from fastflowgrpo.policy import load_policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.prompts import TAGS, Prompt
from fastflowgrpo.rewards import RewardBatch, Scores, build_rewards
from fastflowgrpo.scoring.pipeline import Scoring
from fastflowgrpo.shapes import scenes

SHORT = (
    "--trackers [] --epochs 1 --prompts.per_epoch 4 --rollout.group_size 6 --rollout.batch_size 24 "
    "--rollout.num_steps 5 --rollout.window_start [0,1] --update.ema_every 1 --update.ema_decay 0.5 "
    "--evaluation.num_steps 4 --evaluation.images_per_prompt 3 --max_missing 1 "
)
TEXTS = ["a cat", "two dogs", "a red ball", "the sea"]


def patchy(batch: RewardBatch) -> Scores:
    """How red an image is; no score for the first of a group whose prompt names a cross, none at all for "the sea"."""
    values = batch.images[:, 0].float().mean((1, 2))
    firsts = batch.group_ids != batch.group_ids.roll(1)
    for i, prompt in enumerate(batch.prompts):
        if prompt == "the sea" or ("cross" in prompt and firsts[i]):
            values[i] = math.nan
    return Scores(values)


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory):
    """Full training of the bundled model for two updates, evaluated on two prompts of each tag."""
    folder = tmp_path_factory.mktemp("shapes")
    prompts = [p for tag in TAGS for p in [p for p in scenes.eval_prompts() if p.metadata["tag"] == tag][:2]]
    lines = [json.dumps({**prompt.metadata, "prompt": prompt.text}) for prompt in prompts]
    (folder / "eval.jsonl").write_text("\n".join(lines))
    rewards = '{"geneval": {"weight": 1, "strict": 0.6}, "test_evaluate:patchy": 0.01}'
    command = f"--output_dir {folder / 'run'} --prompts.eval {folder / 'eval.jsonl'} --update.learning_rate 3e-3 "
    assert train.main([*(SHORT + command).split(), "--rewards", rewards]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A LoRA of a tiny pipeline in bfloat16 with guidance, after two updates."""
    folder = tmp_path_factory.mktemp("lora")
    tiny_sd3_pipeline().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    command = (
        f"--model {folder / 'model'} --prompts.train {folder / 'prompts.txt'} --output_dir {folder / 'run'} "
        "--policy.max_sequence_length 8 --policy.lora_rank 4 --policy.lora_alpha 32 --policy.dtype bfloat16 "
        "--rollout.guidance_scale 3 --update.learning_rate 0.05"
    )
    assert train.main([*(SHORT + command).split(), "--rewards", '{"jpeg_compressibility": 1}']) == 0
    return folder / "run"


def evaluations(run):
    """(first, last) as the trainer logged them."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row["eval"] for row in rows if "eval" in row]
    return rows[0], rows[-1]


def means(column):
    """The figures of a column of evaluation.json that the trainer's row has too."""
    scores = {name: row["mean"] for name, row in column["Scores"].items()}
    tags = {name: row["mean"] for name, row in column.get("GenEval, strict", {}).items()}
    diversity = column["Diversity"]["pixels"]["mean"]
    return {**tags, "overall": tags.get("overall", scores["reward"]), "diversity": diversity, "scores": scores}


def same_means(column, row):
    found = means(column)
    assert {*found, "images", "missing"} == set(row)
    assert found.pop("scores") == pytest.approx(row["scores"], rel=1e-5)
    assert found == pytest.approx({name: row[name] for name in found}, rel=1e-5)
    assert column["Scores"]["reward"]["missing"] == row["missing"]


def test_the_columns_are_the_trainers_first_and_last_evaluation(shapes_run, tmp_path, capsys):
    assert main(["--run", str(shapes_run), "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out/evaluation.json").read_text())
    first, last = evaluations(shapes_run)
    assert first["overall"] != last["overall"]
    assert first["missing"] > 0
    same_means(result["base"], first)
    same_means(result["trained"], last)
    assert (result["prompts"], result["images"]) == (12, 36)
    assert result["checkpoint"] == str(shapes_run / "checkpoints/checkpoint-2")
    assert result["settings"]["num_steps"] == 4
    assert {"fastflowgrpo", "torch", "diffusers"} <= set(result["versions"])

    text = (tmp_path / "out/evaluation.md").read_text()
    for title, rows in result["base"].items():
        assert f"| {title} | base | trained | difference | missing |" in text
        for name, base in rows.items():
            trained, change = result["trained"][title][name], result["difference"][title][name]
            line = (
                f"| {name} | {base['mean']:.3f} ± {base['standard_error']:.3f} "
                f"| {trained['mean']:.3f} ± {trained['standard_error']:.3f} "
                f"| {change['mean']:+.3f} ± {change['standard_error']:.3f} | {base['missing']}/{trained['missing']} |"
            )
            assert line in text
            assert line in printed
    assert {*result["base"]["GenEval, official check"]} == {"overall", *TAGS}
    # The trainer drew the same prompts, noise and weights: its picture, below our titles.
    grid, before_after = (np.array(Image.open(p)) for p in (tmp_path / "out/grid.png", shapes_run / "before_after.png"))
    assert np.array_equal(grid[-len(before_after) :], before_after)
    assert (grid[: -len(before_after)] != 255).any()

    assert main(["--run", str(shapes_run), "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: output_dir {tmp_path / 'out'} holds results already: give another, or --overwrite true"
    )


def test_a_lora_checkpoint_with_more_in_its_folder(lora_run, tmp_path):
    """A checkpoint holds averaged weights, raw ones and a training state; each folder's own weights are evaluated."""
    checkpoint = shutil.copytree(lora_run / "checkpoints/checkpoint-2", tmp_path / "checkpoint-2")
    (checkpoint / "training_state.pt").write_bytes(b"nothing of an evaluation's")
    (checkpoint / "raw").mkdir(exist_ok=True)
    name = "pytorch_lora_weights.safetensors"
    raw = {key: 3 * tensor for key, tensor in load_file(checkpoint / name).items()}
    save_file(raw, checkpoint / "raw" / name)  # without metadata, as other trainers write it
    command = (
        f"--model {lora_run.parent / 'model'} --prompts {lora_run.parent / 'prompts.txt'} --guidance_scale 3 "
        "--num_steps 4 --images_per_prompt 3 --policy.max_sequence_length 8 --policy.dtype bfloat16"
    ).split()
    command += ["--rewards", '{"jpeg_compressibility": 1}']
    results = {}
    for weights, folder in (("both", checkpoint), ("trained", checkpoint / "raw")):
        output = tmp_path / weights
        assert main([*command, "--weights", weights, "--checkpoint", str(folder), "--output_dir", str(output)]) == 0
        results[weights] = json.loads((output / "evaluation.json").read_text())
    first, last = evaluations(lora_run)
    assert first["overall"] != last["overall"]
    same_means(results["both"]["base"], first)
    same_means(results["both"]["trained"], last)
    assert "base" not in results["trained"]
    assert "difference" not in results["trained"]
    assert means(results["trained"]["trained"])["overall"] != last["overall"]


def test_the_model_alone_with_a_failing_reward_and_a_clip(lora_run, tmp_path, capsys):
    clip = clip_folder(tmp_path / "clip")
    command = f"--run {lora_run} --weights base --output_dir {tmp_path / 'out'} --diversity_model {clip}".split()
    assert main([*command, "--rewards", "jpeg_incompressibility,test_evaluate:patchy"]) == 0
    result = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert result["checkpoint"] is None
    assert set(result["base"]) == {"Scores", "Diversity"}
    assert "reward" not in result["base"]["Scores"]  # names alone have no common scale
    scores = result["base"]["Scores"]["test_evaluate:patchy"]
    assert (scores["scored"], scores["missing"]) == (9, 3)
    assert scores["mean"] > 10  # zeros in place of the missing would take a quarter
    assert set(result["base"]["Diversity"]) == {"pixels", "latents", "CLIP"}
    assert all(row["mean"] > 0 and row["scored"] == 4 for row in result["base"]["Diversity"].values())
    assert "| test_evaluate:patchy |" in capsys.readouterr().out


def test_noise_depends_only_on_seed_prompt_index_and_image_number(lora_run):
    """Not on the batch, on the rank, or on the number of images per prompt."""
    config = parse_evaluation(["--run", str(lora_run), "--policy.dtype", "float32"])
    policy = load_policy(config.model, config.policy)
    embed = EmbeddingCache(policy)
    scoring = Scoring(build_rewards({"jpeg_compressibility": 1}), policy.decode, policy.device)
    prompts = [(i, Prompt(text)) for i, text in enumerate(TEXTS)]

    def draw(share, n=2, seed=0):
        shape = policy.latent_shape(None, None)
        drawn = sample_and_score(
            policy,
            embed,
            scoring,
            share,
            shape,
            num_steps=2,
            images_per_prompt=n,
            batch_size=4,
            seed=seed,
        )
        assert len(drawn.images) == len(drawn.scores.values) == n * len(share)
        return drawn.images.unflatten(0, (-1, n)).int()

    def differ(a, b):
        return (a - b).abs().max() > 1  # another batch's shape may round otherwise

    whole = draw(prompts)
    assert not differ(draw(prompts[1::2]), whole[1::2])
    assert not differ(draw(prompts[::-1]), whole.flip(0))
    assert not differ(draw(prompts, n=3)[:, :2], whole)
    assert differ(whole[:, 0], whole[:, 1])
    assert differ(draw(prompts, seed=1), whole)
    assert differ(draw([(7, prompts[0][1])]), whole[:1])


def test_every_setting_comes_from_the_run_or_the_command_line(lora_run):
    config = parse_evaluation(["--run", str(lora_run), "--num_steps", "7", "--policy.dtype", "float16"])
    assert (config.num_steps, config.guidance_scale, config.images_per_prompt) == (7, 3, 3)
    assert (config.policy.dtype, config.policy.lora_alpha, config.policy.max_sequence_length) == ("float16", 32, 8)
    assert config.model == str(lora_run.parent / "model")
    assert config.rewards == {"jpeg_compressibility": 1}
    assert config.guidance == 3
    assert parse_evaluation(["--run", str(lora_run), "--guidance_scale_2", "2"]).guidance == (3, 2)


def test_a_sharded_evaluation_is_refused(lora_run, tmp_path, capsys, monkeypatch):
    launched = SimpleNamespace(process_index=0, num_processes=1, distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(comparison, "make_accelerator", lambda *_: launched)
    assert main(["--run", str(lora_run), "--output_dir", str(tmp_path / "out")]) == 2
    assert "an evaluation does not shard the model: use configs/accelerate/ddp.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--run nowhere", "run nowhere is not the directory of a run: there is no nowhere/config.yaml"),
        ("--run {tmp}", "run {tmp} has no checkpoint yet"),
        ("--checkpoint nowhere", "checkpoint nowhere: there is no such folder"),
        ("--checkpoint {tmp}", "checkpoint {tmp}: has neither pytorch_lora_weights.safetensors nor transformer/"),
        ("--checkpoint {tmp}/torn", "checkpoint {tmp}/torn cannot be loaded into a SD3Transformer2DModel: "),
        ("--checkpoint {tmp}/foreign", "checkpoint {tmp}/foreign has weights for unet"),
        ("--checkpoint {lora} {plain}", "checkpoint {lora} cannot be loaded into a SD3Transformer2DModel: "),
        (
            "--run {shapes} --model {model} {plain}",
            "checkpoint {shapes}/checkpoints/checkpoint-2 does not fit the model",
        ),
        ("--weights trained", "weights: trained needs a checkpoint or a run"),
        ("--weights tuned", "weights: expected one of base, trained, both, got tuned (did you mean 'trained'?)"),
        ("--prompts {prompts}", "rewards.geneval: prompt 'a cat' has no GenEval metadata: read prompts from"),
        ("--prompts nowhere.txt", "prompts: nowhere.txt: no such file"),
        ("--rewards genevall", "rewards: unknown reward 'genevall' (did you mean 'geneval'?)"),
        ("--diversity_model nowhere", "diversity_model: cannot load 'nowhere'"),
        ("--num_steps 0", "num_steps: must be at least 1, got 0"),
        ("--guidance_scale -1", "guidance_scale: must be at least 0, got -1"),
        ("--height 50", "rollout.height 50 is not a positive multiple of 16"),
        ("--image_per_prompt 2", "unknown setting image_per_prompt (did you mean 'images_per_prompt'?)"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(shapes_run, lora_run, tmp_path, capsys, arguments, message):
    shutil.copy(shapes_run / "config.yaml", tmp_path)
    lora = lora_run / "checkpoints/checkpoint-2"
    for name in ("torn", "foreign"):
        (tmp_path / name).mkdir()
    whole = (lora / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "torn/pytorch_lora_weights.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"unet.to_q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "foreign/pytorch_lora_weights.safetensors")
    names = {
        "tmp": tmp_path,
        "lora": lora,
        "shapes": shapes_run,
        "model": lora_run.parent / "model",
        "prompts": lora_run.parent / "prompts.txt",
        "plain": f"--prompts {lora_run.parent / 'prompts.txt'} --rewards jpeg_compressibility",
    }
    assert main([*arguments.format(**names).split(), "--output_dir", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: " + message.format(**names))
    assert not (tmp_path / "out").exists()
