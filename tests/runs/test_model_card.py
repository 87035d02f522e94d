"""The model card of a checkpoint, and its upload to the hub."""

import errno
import json
import re
import shutil
from importlib.util import find_spec

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from support.pipelines import tiny_sd3_pipeline

from fastflowgrpo import push, train
from fastflowgrpo.config import read_run, save
from fastflowgrpo.errors import UserError
from fastflowgrpo.runs import hub, model_card
from fastflowgrpo.runs.checkpoints import last_checkpoint
from fastflowgrpo.runs.model_card import PLACE, write_card

# The curve is drawn with matplotlib, which the tests can do without.
PICTURES = ["before_after.png"] + (["curve.png"] if find_spec("matplotlib") else [])

REPOSITORY = "somebody/shapes-grpo"


class Hub:
    """Stands in for the hub: what was made and uploaded."""

    def __init__(self, monkeypatch):
        self.made, self.files, self.card = [], [], ""
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, repo_id, *, private, exist_ok):
        self.made.append((repo_id, private, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        assert repo_id == self.made[-1][0]
        files = [str(path.relative_to(folder_path)) for path in sorted(folder_path.rglob("*")) if path.is_file()]
        self.files = list(filter_repo_objects(files, allow_patterns=allow_patterns))
        self.card = (folder_path / "README.md").read_text()
        self.message = commit_message


@pytest.fixture(scope="module", params=["lora", "full"])
def finished(request, tmp_path_factory):
    """A run of two updates of a tiny pipeline, as a LoRA and in full."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_sd3_pipeline().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs")
    command = (
        f"--model {folder / 'model'} --prompts.train {folder / 'prompts.txt'} --output_dir {folder / 'run'} "
        f"--policy.lora_rank {4 if request.param == 'lora' else 0} --policy.max_sequence_length 8 --trackers [] "
        "--epochs 2 --save_every 1 --update.per_epoch 1 --update.ema_every 1 --prompts.per_epoch 2 "
        "--rollout.group_size 4 --rollout.batch_size 8 --rollout.num_steps 4 --rollout.window_start [0,1] "
        "--evaluation.num_steps 2 --evaluation.images_per_prompt 2"
    ).split()
    assert train.main([*command, "--rewards", '{"jpeg_compressibility": {"weight": 0.5}}']) == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_the_card_of_a_finished_run(finished):
    folder = finished / "checkpoints/checkpoint-2"
    lora = (folder / "pytorch_lora_weights.safetensors").is_file()
    assert {"README.md", *PICTURES} <= {path.name for path in folder.iterdir()}
    assert not (finished / "checkpoints/checkpoint-1/README.md").exists()
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert data["tags"] == ["flow-grpo", "reinforcement-learning", *(["lora"] if lora else [])]
    assert not {"license", "base_model"} & set(data)  # a folder of this machine is no base model of the hub
    for picture in PICTURES:
        assert f"]({picture})" in card.text

    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first, last = (row["eval"] for row in (rows[0], rows[-1]))
    assert "| | before | after 2 updates |" in card.text
    for name in ("overall", "diversity"):
        assert f"| {name} | {first[name]:.3f} | {last[name]:.3f} |" in card.text
    assert "without a score: 0 before, 0 after" in card.text
    assert "trained for 2 updates" in card.text
    assert "exponential moving average" in card.text
    for package in ("fastflowgrpo", "torch", "diffusers"):
        assert re.search(rf"{package} \d+\.\d+", card.text)
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
    assert recipe["rewards"] == {"jpeg_compressibility": {"weight": 0.5}}
    assert recipe["rollout"]["group_size"] == 4
    assert "output_dir" not in recipe


def test_the_cards_code_draws_an_image_with_the_trained_weights(finished, monkeypatch):
    folder = finished / "checkpoints/checkpoint-2"
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    names = {"prompt": "a cat"}
    exec(code.replace(PLACE, str(folder)), names)
    pipe = names["pipe"]
    assert names["image"].size == (16, 16)
    assert "num_inference_steps=2" in code
    base = tiny_sd3_pipeline().transformer
    lora = (folder / "pytorch_lora_weights.safetensors").is_file()
    assert bool(pipe.get_active_adapters()) == lora
    changed = any("lora_B" in name and parameter.any() for name, parameter in pipe.transformer.named_parameters())
    if not lora:
        theirs = dict(pipe.transformer.named_parameters())
        changed = any((theirs[name] != parameter).any() for name, parameter in base.named_parameters())
    assert changed


def test_a_card_of_an_earlier_checkpoint_and_of_a_model_on_the_hub(run, monkeypatch):
    index = model_card._index(read_run(run))
    monkeypatch.setattr(model_card, "_index", lambda config: index)
    config = read_run(run)
    config.model = "owner/model"
    config.update.ema_every = 2
    config.rewards = {"deqa": {"weight": 1.0, "base_url": "http://10.1.2.3:17140", "api_key_env": "KEY"}}
    save(config, run / "config.yaml")
    card = ModelCard.load(write_card(run, run / "checkpoints/checkpoint-1"))
    lora = "lora" in card.data.tags
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/model", "adapter" if lora else "finetune")
    assert "| | before | after 0 updates |" in card.text  # the last evaluation before this checkpoint
    assert "exponential moving average" not in card.text  # whose first step is after this checkpoint
    assert "'owner/model'" in card.text
    assert "10.1.2.3" not in card.content
    assert "KEY" not in card.content


def test_weights_card_and_pictures_are_pushed_and_nothing_else(run, monkeypatch, capsys):
    hub = Hub(monkeypatch)
    folder = last_checkpoint(run)
    for name in ("optimizer.bin", "training_state/rng.pt", "raw/pytorch_lora_weights.safetensors", "raw/README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"private")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("# model after", "# My model, after"))
    assert push.main([str(run), REPOSITORY, "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"https://hub/{REPOSITORY}"
    assert hub.made == [(REPOSITORY, True, True)]
    assert "checkpoint-2" in hub.message
    lora = (folder / "pytorch_lora_weights.safetensors").is_file()
    weights = (
        ["pytorch_lora_weights.safetensors"]
        if lora
        else ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    )
    assert sorted(hub.files) == sorted(["README.md", *PICTURES, *weights])
    assert "# My model, after" in hub.card  # what its author wrote stays
    assert f'"{REPOSITORY}"' in hub.card
    assert PLACE not in hub.card

    card.unlink()  # as in a run that did not come to its end
    assert push.main([str(run), REPOSITORY, "--checkpoint", str(run / "checkpoints/checkpoint-1")]) == 0
    assert "trained for 1 updates" in hub.card
    assert hub.made[-1] == (REPOSITORY, None, True)


@pytest.mark.parametrize("finished", ["lora"], indirect=True)
def test_a_failing_push_is_one_line_with_what_to_do(run, monkeypatch, capsys):
    """The tests' HF_HUB_OFFLINE makes the hub's own client fail."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert push.main([str(run), REPOSITORY]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {run / 'checkpoints/checkpoint-2'} was not pushed to {REPOSITORY}: OfflineMode")
    assert error.endswith(f"try again with: python -m fastflowgrpo.push {run} {REPOSITORY}")
    assert push.main([str(run.parent), REPOSITORY]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: run {run.parent} has no checkpoint yet"
    assert push.main([str(run), REPOSITORY, "--checkpoint", str(run)]) == 2
    assert "is no folder checkpoint-STEP with trained weights" in capsys.readouterr().err
    assert push.main([str(run), "a/b/c"]) == 2
    assert "Repo id must be" in capsys.readouterr().err


@pytest.mark.parametrize("finished", ["lora"], indirect=True)
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_pushes_at_its_end_and_survives_a_push_that_fails(run, tmp_path, monkeypatch, capsys, fails):
    hub = Hub(monkeypatch)
    if fails:

        def upload_folder(self, **options):
            raise ConnectionResetError("the line went dead")

        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    again = tmp_path / "again"
    command = f"--config {run / 'config.yaml'} --output_dir {again} --epochs 1 --hub_model_id {REPOSITORY}".split()
    assert train.main([*command, "--hub_private", "true"]) == 0
    captured = capsys.readouterr()
    assert (again / "checkpoints/checkpoint-1/pytorch_lora_weights.safetensors").is_file()
    assert (again / "summary.json").is_file()
    assert hub.made == [(REPOSITORY, True, True)]
    if fails:
        assert hub.files == []
        warning = captured.err.splitlines()[-1]
        assert "ConnectionResetError: the line went dead" in warning
        assert warning.endswith(f"try again with: python -m fastflowgrpo.push {again} {REPOSITORY}")
    else:
        assert "pytorch_lora_weights.safetensors" in hub.files
        assert f"https://hub/{REPOSITORY}" in captured.out


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [("no one/x", "hf_test", "hub_model_id: Repo id must"), (REPOSITORY, None, "hub_model_id: to push to somebody/")],
)
def test_a_push_that_cannot_work_stops_the_run_at_its_start(tmp_path, monkeypatch, capsys, name, token, message):
    monkeypatch.setattr(hub, "get_token", lambda: token)
    assert train.main(["--output_dir", str(tmp_path / "run"), "--hub_model_id", name]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_a_card_that_cannot_be_written_is_one_line(finished, monkeypatch):
    def fail(self, path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(ModelCard, "save", fail)
    with pytest.raises(UserError, match=r"README\.md cannot be written: Input/output error"):
        write_card(finished, last_checkpoint(finished))
