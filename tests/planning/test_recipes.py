"""Every file in configs/ parses, states its estimated cost, and has the paper's batches on any number of processes.

`python tests/planning/test_recipes.py` writes the costs into the files.
"""

from dataclasses import asdict
from pathlib import Path

import pytest

from fastflowgrpo.config import parse
from fastflowgrpo.planning import estimate as estimation
from fastflowgrpo.planning.plan import batch_plan
from fastflowgrpo.prompts.sources import GENERATORS
from fastflowgrpo.rewards import REWARDS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = [path for path in CONFIGS if not path.stem.startswith("shapes")]
COST = "# What it costs (--dry_run, on 1 GPU):"


def with_cost(text: str, cost: str) -> str:
    """A config with the comment lines after `COST` replaced by a cost."""
    before, _, after = text.partition(COST + "\n")
    settings = after.splitlines(keepends=True)
    while settings[0].startswith("#"):
        del settings[0]
    return "".join([before, COST, "\n", *(f"#   {line}\n" for line in cost.splitlines()), *settings])


def once(run):
    """Cache `run_passes`: recipes with the same model and batches have the same passes."""
    known = {}

    def passes(config, *batches):
        rollout = config.rollout
        key = str((config.model, config.policy, rollout.height, rollout.width, rollout.num_frames, batches))
        if key not in known:
            known[key] = run(config, *batches)
        return known[key]

    return passes


@pytest.fixture(scope="module")
def passes_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimation, "run_passes", once(estimation.run_passes))
        yield


@pytest.mark.usefixtures("passes_once")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_a_recipe_costs_what_it_says(path):
    text = path.read_text()
    config = parse(["--config", str(path)])
    assert COST in text and config.output_dir == f"runs/{path.stem}"
    assert text == with_cost(text, str(estimation.estimate(config)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("processes", [1, 8, 24])
def test_a_recipe_has_the_same_groups_on_every_machine(path, processes):
    config = parse(["--config", str(path)])
    plan = batch_plan(config, processes)
    assert plan.groups == 48 and plan.updates == config.update.per_epoch and plan.utilization == 1
    assert plan.updates == 2 or config.update.algorithm in ("nft", "awm")
    assert plan.group_size == (12 if path.stem.startswith("wan") else 24)
    assert plan.groups_per_process == (48 // processes,) * 2
    assert plan.rollout_batches * plan.rollout_batch_size * processes == plan.images
    assert plan.micro_batches * plan.micro_batch_size * processes * plan.updates == plan.pairs


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_starts_without_a_file(path):
    config = parse(["--config", str(path)])
    assert config.prompts.train in GENERATORS and config.prompts.eval is None
    assert set(config.rewards) <= set(REWARDS)
    commands = path.read_text().replace("\\\n#", "").splitlines()
    for launcher in ("python -m fastflowgrpo.train", "accelerate launch", "sbatch"):
        (command,) = [line for line in commands if launcher in line]
        assert command.endswith(f"--config configs/{path.name}")


def test_the_papers_hyperparameters():
    """Appendix B of arXiv 2505.05470."""
    for name, kl_weight in (("geneval", 0.04), ("ocr", 0.04), ("pickscore", 0.01)):
        config = parse(["--config", str(ROOT / f"configs/sd35_{name}.yaml")])
        rollout, update = config.rollout, config.update
        assert (rollout.height, rollout.width, rollout.num_steps) == (512, 512, 10)
        assert (rollout.dynamics, rollout.noise_level, rollout.window_size) == ("flow_sde", 0.7, None)
        assert rollout.guidance_scale == 4.5 and config.evaluation.num_steps == 40
        assert (config.policy.lora_rank, config.policy.lora_alpha) == (32, 64)
        assert (update.learning_rate, update.betas, update.weight_decay) == (3e-4, (0.9, 0.999), 1e-4)
        assert (update.max_grad_norm, update.clip_range) == (1.0, 1e-4)
        assert (update.kl, update.kl_weight) == ("flow_grpo", kl_weight)
        assert (update.ema_decay, update.ema_every) == (0.9, 8)
        assert (config.advantage.std, config.advantage.clip) == ("global", 5.0)
        fast = parse(["--config", str(ROOT / f"configs/sd35_{name}_fast.yaml")])
        assert (fast.rollout.dynamics, fast.rollout.noise_level) == ("flow_cps", 0.8)
        assert (fast.rollout.window_size, fast.rollout.window_start) == (3, (0, 5))
        assert (fast.rollout.guidance_scale, fast.evaluation.guidance_scale) == (1.0, None)
        assert (fast.update.clip_range, fast.update.kl_weight) == (1e-5, 0.0)
        assert (fast.rewards, fast.prompts, fast.policy) == (config.rewards, config.prompts, config.policy)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("", {"rollout": {"keep_unconditional": True}, "update": {"kl_share": 0.25}}),
        ("_fast", {"rollout": {"same_noise": True, "tail_steps": 3, "solver": "dpm_solver"}}),
    ],
)
def test_a_lean_recipe_is_its_model_with_fewer_passes(name, settings):
    plain, lean = (
        asdict(parse(["--config", str(ROOT / f"configs/sd35_ocr{stem}.yaml")])) for stem in (name, f"{name}_lean")
    )
    plain["output_dir"] += "_lean"
    for group, changes in settings.items():
        plain[group] |= changes
    assert lean == plain


def test_the_hyperparameters_of_diffusion_nft():
    """Of its SD3.5-M runs, arXiv 2509.16117: 48 groups of 24, all steps of the rollout but the last, lr 3e-4."""
    decays = {
        "geneval": (1.0, 1, 0.001, 0, 0.5),
        "ocr": (0.1, 2, 0.0075, 75, 0.999),
        "pickscore": (1.0, 1, 0.001, 0, 0.5),
    }
    for name, expected in decays.items():
        config = parse(["--config", str(ROOT / f"configs/sd35_{name}_nft.yaml")])
        rollout, update = config.rollout, config.update
        assert (rollout.dynamics, rollout.num_steps, rollout.guidance_scale) == ("ode", 10, 1.0)
        assert (update.noise_levels, update.noise_draws, update.kl_weight) == ("rollout", 9, 1e-4)
        schedule = (update.old_decay_slope, update.old_decay_start, update.old_decay_max)
        assert (update.nft_beta, update.per_epoch, *schedule) == expected
        paper = parse(["--config", str(ROOT / f"configs/sd35_{name}.yaml")])
        assert (config.rewards, config.prompts, config.policy) == (paper.rewards, paper.prompts, paper.policy)


if __name__ == "__main__":
    estimation.run_passes = once(estimation.run_passes)
    for config_file in CONFIGS:
        found = estimation.estimate(parse(["--config", str(config_file)]))
        config_file.write_text(with_cost(config_file.read_text(), str(found)))
        print(f"{config_file.name}\n{found}\n")
