"""The command line: settings, their order, their help, and a one-line message for every error."""

import importlib
import math
import re
import subprocess
import sys
import types
from dataclasses import asdict, fields, is_dataclass
from operator import attrgetter

import docstring_parser
import pytest
import yaml

from fastflowgrpo import train
from fastflowgrpo.config import Config, EvaluateConfig, parse, parse_settings, save, setting_types, validate
from fastflowgrpo.errors import UserError

# error -> the command line, and a part of its message
WRONG = {
    "unknown setting": (
        ["--rollout.num_stps", "3"],
        "unknown setting rollout.num_stps (did you mean 'rollout.num_steps'?)",
    ),
    "dash for underscore": (["--rollout.num-steps=3"], "did you mean 'rollout.num_steps'?"),
    "no group": (["--group_size", "4"], "did you mean 'rollout.group_size'?"),
    "abbreviation": (["--epoch", "4"], "did you mean 'epochs'?"),
    "nothing near": (["--zzz", "4"], "unknown setting zzz; --help explains them all"),
    "a group": (["--rollout", "3"], "rollout: is a group of settings"),
    "stray word": (["oops"], "oops"),
    "no value": (["--epochs"], "--epochs: expected one argument"),
    "not an int": (["--rollout.num_steps", "x"], "rollout.num_steps: expected int, got x"),
    "a fraction": (["--epochs", "3.5"], "epochs: expected int, got 3.5"),
    "not a bool": (["--overwrite", "maybe"], "overwrite: expected bool, got maybe"),
    "optional": (["--rollout.window_size", "x"], "rollout.window_size: expected int | null, got x"),
    "pair": (["--rollout.window_start", "[1, 2, 3]"], "rollout.window_start: expected tuple[int, int], got [1, 2, 3]"),
    "list": (["--trackers", "wandb"], "trackers: expected list[str], got wandb"),
    "object": (["--rewards", "{bad"], "rewards: expected dict[str, Any], got {bad"),
    "choice": (
        ["--rollout.dynamics", "flow_sd"],
        "rollout.dynamics: expected one of flow_sde, flow_cps, dance_sde, ode, got flow_sd (did you mean 'flow_sde'?)",
    ),
    "choice or null": (
        ["--policy.text_encoder_dtype", "bfloat"],
        "expected one of float32, bfloat16, float16, got bfloat (did you mean 'bfloat16'?)",
    ),
    "empty": (["--update.kl", ""], "update.kl: expected one of flow_grpo, exact, velocity, got nothing"),
    "no file": (["--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    "negative": (["--seed", "-1"], "seed: must be at least 0, got -1"),
    "no epochs": (["--epochs", "0"], "epochs: must be at least 1, got 0"),
    "lonely": (["--rollout.group_size", "1"], "rollout.group_size: must be at least 2, got 1"),
    "no noise": (["--rollout.noise_level", "0"], "rollout.noise_level: must be above 0, got 0"),
    "nan": (["--update.clip_range", ".nan"], "update.clip_range: must be above 0, got nan"),
    "one of a pair": (["--update.betas", "[0.9, 1.0]"], "update.betas: must be below 1, got 1.0"),
    "cps": (
        ["--rollout.dynamics", "flow_cps", "--rollout.noise_level", "1.2"],
        "rollout.noise_level: must be at most 1 for flow_cps, got 1.2",
    ),
    "LoRA and full": (["--policy.lora", "x", "--policy.lora_rank", "0"], "policy.lora_rank: is 0, which trains"),
    "no layers": (["--policy.lora_targets", "[]"], "policy.lora_targets: is empty; set policy.lora_rank to 0"),
    "batch": (
        ["--rollout.batch_size", "100"],
        "rollout.batch_size: must be a multiple of rollout.group_size, but 100 = 4 x 24 + 4",
    ),
    "updates": (
        ["--prompts.per_epoch", "23"],
        "prompts.per_epoch: must be a multiple of update.per_epoch, but 23 = 11 x 2 + 1",
    ),
    "empty range": (["--rollout.window_start", "[3, 3]"], "rollout.window_start: low must be below high, got [3, 3)"),
    "window": (
        ["--rollout.window_start", "[0, 8]"],
        "rollout.window_start: a window of 3 steps from step 7 on needs 10 steps, but rollout.num_steps = 10 has 9",
    ),
    "no log-prob": (
        ["--rollout.dynamics", "ode", "--update.algorithm", "grpo_guard"],
        "rollout.dynamics: update.algorithm grpo_guard learns from log-probs, and ode has none; choose flow_sde",
    ),
    "not of dpo": (
        ["--update.algorithm", "dpo", "--update.clip_range", "1e-4", "--advantage.std", "group"],
        "update.algorithm: dpo does not use advantage.std (default global), update.clip_range (default 0.01): leave",
    ),
    "not of grpo": (["--update.data", "offline"], "update.algorithm: grpo does not use update.data (default online)"),
    "not of sft": (
        ["--update.algorithm", "sft", "--update.dpo_beta", "5"],
        "update.algorithm: sft does not use update.dpo_beta (default 100.0)",
    ),
    "not of the ODE": (
        ["--update.algorithm", "sft", "--rollout.dynamics", "ode", "--rollout.same_noise", "true"],
        "rollout.dynamics: ode does not use rollout.same_noise (default False)",
    ),
    "no tail": (
        ["--rollout.window_size", "null", "--rollout.tail_steps", "2"],
        "rollout.tail_steps: one step is left after the window; set rollout.window_size",
    ),
    "no steps after the window": (
        ["--rollout.window_size", "null", "--rollout.solver", "dpm_solver"],
        "rollout.solver: one step is left after the window; set rollout.window_size",
    ),
    "not of the divergence": (
        ["--update.trust_region", "divergence", "--update.clip_range", "0.1"],
        "update.trust_region: divergence does not use update.clip_range (default 0.01): leave at the default",
    ),
    "not of the clip": (
        ["--update.divergence_limit", "0.1"],
        "update.trust_region: clip does not use update.divergence_limit (default 1e-05)",
    ),
    "not of grpo_guard": (
        ["--update.algorithm", "grpo_guard", "--update.trust_region", "divergence"],
        "update.algorithm: grpo_guard does not use update.trust_region (default clip)",
    ),
    "trained guard": (
        ["--evaluation.guard", "geneval", "--rewards", '{"geneval": 1}'],
        "evaluation.guard: geneval is trained on; choose another reward, or set its weight to 0",
    ),
    "two guards": (
        ["--evaluation.guard", '{"ocr": 1, "pickscore": 1}'],
        "evaluation.guard: must be one reward, got ocr, pickscore",
    ),
    "one reward": (["--advantage.mode", "gdpo"], "advantage.mode: gdpo normalises each of several rewards, and there"),
    "no choice": (
        ["--rollout.candidates", "24"],
        "rollout.candidates: 24 candidates leave no choice of rollout.group_size 24: set more of them, or null",
    ),
    "odd group": (
        ["--rollout.candidates", "96", "--rollout.group_size", "9", "--rollout.batch_size", "9"],
        "rollout.group_size: must be even with rollout.candidates, for as many best candidates as worst ones, got 9",
    ),
    "equal candidates": (
        ["--rollout.candidates", "96", "--rollout.same_noise", "true"],
        "rollout.candidates: candidates differ by their initial noise; set rollout.same_noise to false",
    ),
    "candidates ahead": (
        ["--rollout.candidates", "96", "--rollout.ahead", "12"],
        "rollout.ahead: candidates wait for their scores before their groups are sampled; set it to 0",
    ),
    "too far ahead": (["--rollout.ahead", "25"], "rollout.ahead: must be at most prompts.per_epoch 24, got 25"),
    "ahead without a ratio": (
        ["--update.algorithm", "awm", "--rollout.ahead", "12"],
        "update.algorithm: awm does not use rollout.ahead (default 0): leave at the default",
    ),
    "no candidates": (
        ["--rollout.candidate_steps", "3"],
        "rollout.candidate_steps: nothing is explored unless rollout.candidates is set",
    ),
    "no candidates to solve": (
        ["--rollout.candidate_solver", "euler"],
        "rollout.candidate_solver: nothing is explored unless rollout.candidates is set",
    ),
    "no stride": (["--rollout.window_epochs", "5"], "rollout.window_epochs: the window does not move unless"),
    "no window": (
        ["--rollout.window_stride", "1", "--rollout.window_size", "null"],
        "rollout.window_stride: all steps but the last are the window; set rollout.window_size",
    ),
}

# error -> the YAML file, and a part of the message after the file's name
WRONG_FILES = {
    "unknown setting": (
        "rollout:\n  num_stps: 3",
        "unknown setting rollout.num_stps (did you mean 'rollout.num_steps'?)",
    ),
    "unknown group": ("rolout: {num_steps: 3}", "unknown setting rolout (did you mean 'rollout'?)"),
    "not a name": ("3: 4", "unknown setting 3; --help explains them all"),
    "bad value": ("rollout: {num_steps: x}", "rollout.num_steps: expected int, got x"),
    "value for a group": ("rollout: 3", "rollout: is a group of settings, got 3"),
    "group without settings": ("rollout:", "rollout: is a group of settings, got None"),
    "not YAML": ("epochs: 3\nrollout: {num_steps: 3", "is not YAML, line 2: "),
    "not text": ("epochs: \udcff", "is not YAML: "),
    "a list": ("- epochs", "expected settings (name: value), got ['epochs']"),
    "nothing": ("# epochs: 3", "expected settings (name: value), got None"),
}


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    assert train.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err)
    return err


@pytest.mark.parametrize(("argv", "message"), WRONG.values(), ids=WRONG)
def test_wrong_command_line(argv, message, capsys):
    assert message in error_of(argv, capsys)


@pytest.mark.parametrize(("text", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_file(text, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert f"{path}: {message}" in error_of(["--config", str(path)], capsys)


def test_null_is_no_value_for_a_setting_that_needs_one(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("epochs: null\nseed: 1\n")
    assert "epochs: expected int, got null" in error_of(["--config", str(path)], capsys)
    path.write_text("rollout: {window_size: null}\n")
    assert parse(["--config", str(path)]).rollout.window_size is None


def test_a_long_message_stays_one_line(capsys):
    assert "seed: expected int, got a b" in error_of(["--seed", "a\nb"], capsys)


def test_defaults_are_valid_and_are_what_an_empty_command_line_gives():
    validate(Config())
    assert parse([]) == Config()


NUMBERS = [
    name
    for name, hint in setting_types().items()
    if re.search(r"\b(int|float)\b", str(hint)) and "dict" not in str(hint)
]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_lower_limit(name):
    config = Config()
    *group, field = name.split(".")
    owner = attrgetter(*group)(config) if group else config
    for value in (-(10**6), math.nan):
        setattr(owner, field, (value, value) if isinstance(getattr(owner, field), tuple) else value)
        with pytest.raises(UserError, match=rf"^{name}: must be (at least|above) \d, got {value}$"):
            validate(config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1),
        ({"rollout.guidance_scale": 4}, 4),
        ({"rollout.guidance_scale": 4, "rollout.guidance_scale_2": 3}, (4, 3)),
        ({"rollout.guidance_scale": 4, "rollout.guidance_scale_2": 3, "evaluation.guidance_scale_2": 2}, (4, 2)),
        ({"rollout.guidance_scale": 4, "rollout.guidance_scale_2": 3, "evaluation.guidance_scale": 1}, 1),
        ({"evaluation.guidance_scale": 5, "evaluation.guidance_scale_2": 2}, (5, 2)),
    ],
)
def test_guidance_of_an_evaluation(settings, expected):
    assert parse([f"--{name}={value}" for name, value in settings.items()]).evaluation_guidance == expected


@pytest.mark.parametrize("group", ["rollout", "evaluation"])
def test_a_second_guidance_scale_alone_guides_nothing(group):
    message = rf"^{group}\.guidance_scale_2: .* does not guide if {group}\.guidance_scale is 1: set it too$"
    with pytest.raises(UserError, match=message):
        parse([f"--{group}.guidance_scale_2", "3"])


def test_values_at_the_limits_are_accepted():
    argv = ["--rollout.window_start", "[6, 7]", "--rollout.dynamics", "flow_cps", "--rollout.noise_level", "1"]
    config = parse([*argv, "--rollout.batch_size", "2400", "--policy.lora_rank", "0", "--policy.lora_targets", "[]"])
    assert config.rollout.window_start == (6, 7)
    assert parse(["--rollout.num_steps", "2", "--rollout.window_size", "null"]).rollout.num_steps == 2
    ode = parse(["--update.algorithm", "rwr", "--rollout.dynamics", "ode", "--rollout.num_steps", "3"])
    assert ode.rollout.window_size == 3  # nothing reads it


def test_later_settings_win_and_the_others_stay(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("epochs: 3\nseed: 5\nrollout: {num_steps: 11, noise_level: 0.5}\n")
    second.write_text("epochs: 4\nrollout:\n  num_steps: 12\nupdate: {learning_rate: 1e-5}\n")
    config = parse(["--seed", "6", "--config", str(first), "--config", str(second), "--rollout.num_steps", "13"])
    expected = Config(epochs=4, seed=5)
    expected.rollout.num_steps, expected.rollout.noise_level, expected.update.learning_rate = 13, 0.5, 1e-5
    assert config == expected


def test_an_object_is_replaced_as_a_whole_or_set_entry_by_entry():
    assert parse(["--rewards", '{"jpeg_compressibility": 1}']).rewards == {"jpeg_compressibility": 1}
    geneval = Config().rewards["geneval"]
    assert parse(["--rewards.ocr", "0.5"]).rewards == {"geneval": geneval, "ocr": 0.5}
    mix = parse(["--prompts.mix.counting", "2", "--prompts.mix.position", "1"]).prompts.mix
    assert mix == {"counting": 2, "position": 1}


def test_a_list_can_be_extended():
    assert parse(["--trackers+", "wandb"]).trackers == ["tensorboard", "wandb"]


def test_saved_config_is_complete_and_reads_back_equal(tmp_path):
    path = tmp_path / "config.yaml"
    config = parse(["--output_dir", "runs/é: 1", "--rollout.window_start", "[1, 4]", "--update.learning_rate", "3e-7"])
    config.rewards = {"ocr": {"weight": 0.25}, "my.module:reward": 1}
    save(config, path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert asdict(config).keys() == written.keys()
    assert written["rollout"].keys() == asdict(config.rollout).keys()
    assert parse(["--config", str(path)]) == config


def test_print_config_shows_every_setting(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        parse(["--seed", "7", "--print_config"])
    assert stop.value.code == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse(["--config", str(path)]) == Config(seed=7)
    assert yaml.safe_load(path.read_text())["update"].keys() == asdict(Config())["update"].keys()


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    squeezed = re.sub(r"\s", "", text)  # argparse breaks lines at hyphens too
    settings = {name: hint for name, hint in setting_types().items() if not is_dataclass(hint)}
    assert len(settings) > 40
    for name in settings:
        assert re.search(rf"^  --{re.escape(name)}[ ,]", text, re.MULTILINE)
    for group in [Config, *(hint for hint in setting_types().values() if is_dataclass(hint))]:
        documented = {param.arg_name: param.description for param in docstring_parser.parse_from_object(group).params}
        for field in fields(group):
            if not is_dataclass(field.type):
                assert re.sub(r"\s", "", documented[field.name]) in squeezed


def test_what_was_read_before_changes_no_later_reading():
    parse(["--seed", "3"]).rewards["other"] = 1.0
    assert parse([]) == Config()
    assert parse_settings(EvaluateConfig, "evaluate", [], {"num_steps": 7}).num_steps == 7
    assert parse_settings(EvaluateConfig, "evaluate", []) == EvaluateConfig()


def test_help_and_wrong_settings_do_not_wait_for_torch():
    code = "import sys; from fastflowgrpo import train; train.main(['--zzz', '1']); "
    code += "print(*{'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr == "error: unknown setting zzz; --help explains them all\n"
    assert result.stdout == "\n"


def run_with(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> int:
    """Exit code of the command when the training ends with that error."""

    class Trainer:
        def __init__(self, config):
            assert config == Config(seed=3)

        def run(self):
            if error is not None:
                raise error

    module = types.ModuleType("fastflowgrpo.trainer")
    module.Trainer = Trainer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return train.main(["--seed", "3"])


def test_exit_codes_of_training(monkeypatch, capsys):
    importlib.import_module("fastflowgrpo.policy")  # transformers warns while it is imported for the first time
    capsys.readouterr()
    assert run_with(monkeypatch, None) == 0
    assert capsys.readouterr().err == ""
    assert run_with(monkeypatch, UserError("model:\n  no such folder")) == 2
    assert capsys.readouterr().err == "error: model: no such folder\n"
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(ValueError, match="a bug"):
        run_with(monkeypatch, ValueError("a bug"))
