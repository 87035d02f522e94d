"""Runs that are killed, interrupted, damaged or full, and go on."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import killed_run
from support.forks import FORK
from support.pipelines import tiny_sd3_pipeline
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastflowgrpo import Trainer
from fastflowgrpo.config import parse
from fastflowgrpo.distributed import Processes, make_accelerator
from fastflowgrpo.errors import UserError
from fastflowgrpo.learning.learner import Learner
from fastflowgrpo.learning.policy_gradient import GRPO
from fastflowgrpo.runs import checkpoints, lock, resume, signals, state
from fastflowgrpo.runs.lock import RunLock
from fastflowgrpo.scoring.epoch import EpochSampler
from fastflowgrpo.scoring.pipeline import Scoring
from fastflowgrpo.train import main

pytestmark = pytest.mark.xdist_group("resume")

PROMPTS = ["a cat", "two dogs", "a red ball", "the sea", "a cat on a ball", "snow"]
TIMEOUT = 600  # seconds; nothing takes more than one or two


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd3")
    tiny_sd3_pipeline().save_pretrained(path)
    (path / "prompts.txt").write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(autouse=True)
def _ctrl_c():
    """As at a terminal: in a script's background job SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def command(model, output, **settings):
    settings = {
        "model": model,
        "prompts.train": model / "prompts.txt",
        "prompts.eval": model / "prompts.txt",
        "prompts.per_epoch": 2,
        "output_dir": output,
        "trackers": "[]",
        "rewards": '{"support.killed_run:noisy": 1}',
        "policy.max_sequence_length": 8,
        "policy.lora_rank": 4,
        "epochs": 6,
        "rollout.group_size": 4,
        "rollout.batch_size": 4,
        "rollout.num_steps": 4,
        "rollout.window_size": 2,
        "rollout.window_start": "[0,2]",
        "update.batch_size": 4,
        "update.ema_every": 1,
        "evaluation.every": 3,
        "evaluation.num_steps": 2,
        "evaluation.images_per_prompt": 1,
        "save_every": 2,
        "resume": "latest",
        **settings,
    }
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def start(arguments, folder, **options):
    """A run in a process of its own, its output in FOLDER.log; options as for `killed_run.run`."""
    process = FORK.Process(target=killed_run.run, args=(arguments, str(folder), f"{folder}.log"), kwargs=options)
    process.start()
    return process


def end(process):
    process.join(TIMEOUT)
    return process.exitcode


def rows_of(run):
    """metrics.jsonl without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row.keys() - {"wall_s", "seconds", "images_per_s"}} for row in rows]


def result(run):
    """What two equal runs have in common: the rows, the bits of the last checkpoint's tensors, and the gallery."""
    last = checkpoints.list_checkpoints(run)[-1]
    tensors = {
        f"{path.relative_to(last)}: {name}": tensor.numpy().tobytes()
        for path in last.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    index = [json.loads(line) | {"time": 0} for line in (run / "gallery/index.jsonl").read_text().splitlines()]
    return rows_of(run), tensors, index, {path.relative_to(run): path.read_bytes() for path in run.glob("gallery/*/*")}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Run folder by LoRA rank, of a run that nothing happened to."""
    folders = {}
    for rank in (4, 0):
        folder = folders[rank] = tmp_path_factory.mktemp("whole") / "run"
        assert main(command(model, folder, **{"policy.lora_rank": rank})) == 0
    return folders


@pytest.mark.parametrize(("rank", "shares", "others"), [(4, (0.1, 0.3, 0.3, 0.6, 0.9), 2), (0, (0.3, 0.3, 0.6), 1)])
@pytest.mark.slow
def test_a_run_killed_at_any_moment_and_resumed_is_the_unbroken_one(model, whole, tmp_path, rank, shares, others):
    """Killed where it touches one of its files, mostly while it saves, within the given share of those that a whole run
    touches, and some more times at moments that nothing marks."""
    run, touches = tmp_path / "run", tmp_path / "touches"
    arguments = command(model, run, **{"policy.lora_rank": rank})
    assert end(start(command(model, tmp_path / "count"), tmp_path / "count", count=str(touches))) == 0
    number = int(touches.read_text())
    draw, deaths = random.Random(rank), 0
    for share in shares:
        deaths += end(start(arguments, run, kill_at=draw.randrange(int(share * number)))) == -signal.SIGKILL
    for _ in range(others):
        process = start(arguments, run)
        time.sleep(draw.random())
        process.kill()
        deaths += end(process) == -signal.SIGKILL
    assert deaths > 1
    assert end(start(arguments, run)) == 0, Path(f"{run}.log").read_text()
    assert result(run) == result(whole[rank])
    assert not list(run.glob("checkpoints/.*"))


def on_call(monkeypatch, owner, name, number, act):
    """Call `act` before the number-th call of a function."""
    function, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(("algorithm", "candidates"), [("nft", "null"), ("awm", 6), ("dgpo", "null")])
def test_a_run_with_an_old_policy_resumes_as_the_unbroken_one(model, tmp_path, monkeypatch, algorithm, candidates):
    settings = {"update.algorithm": algorithm, "rollout.dynamics": "ode", "update.old_decay_slope": 0.1}
    settings["rollout.candidates"] = candidates
    default = {"rollout.window_size": 3, "rollout.window_start": "[0,6]", "rollout.num_steps": 4}
    unbroken, broken = (command(model, tmp_path / name, **settings, **default) for name in ("unbroken", "broken"))
    assert main(unbroken) == 0
    with monkeypatch.context() as patched:
        on_call(patched, Trainer, "collect", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(broken) == 143
    assert main(broken) == 0
    assert result(tmp_path / "broken") == result(tmp_path / "unbroken")
    training = tmp_path / "broken/checkpoints/checkpoint-12/training"
    old, weights = (load_file(training / f"{name}.safetensors") for name in ("old_policy", "weights"))
    assert old.keys() == weights.keys()
    assert any(not torch.equal(old[name], weights[name]) for name in weights)


def test_a_run_that_samples_ahead_resumes_as_the_unbroken_one(model, tmp_path, monkeypatch):
    """Ended where the next epoch's group is sampled already; failed in an update; set back to a checkpoint."""

    def fail():
        raise UserError("the gradient is not finite")

    settings = {"rollout.ahead": 1, "rewards": '{"jpeg_compressibility": 1}', "epochs": 4, "evaluation.every": 2}
    settings["rollout.offload_trajectory"] = "true"
    unbroken, broken = (command(model, tmp_path / name, **settings) for name in ("unbroken", "broken"))
    broken += ["--save_every", "0"]
    assert main(unbroken) == 0
    whole = result(tmp_path / "unbroken")
    ends = (
        (Scoring, "finish", 5, lambda: os.kill(os.getpid(), signal.SIGTERM), 143, 2),  # two were evaluations
        (Learner, "accumulate", 3, fail, 2, 3),  # the first of an epoch's two
    )
    for owner, name, number, act, code, epochs in ends:
        with monkeypatch.context() as patched:
            on_call(patched, owner, name, number, act)
            assert main(broken) == code
        last = checkpoints.list_checkpoints(tmp_path / "broken")[-1]
        assert json.loads((last / "manifest.json").read_text())["epoch"] == epochs
        assert load_file(last / "training/ahead.safetensors")["final"].shape[:2] == (1, 4)
    assert main(broken) == 0
    assert result(tmp_path / "broken") == whole
    assert main([*unbroken, "--resume", str(tmp_path / "unbroken/checkpoints/checkpoint-4")]) == 0
    assert result(tmp_path / "unbroken") == whole


PLACES = {  # what is called, for which time, and the whole epochs that the last checkpoint has behind it
    "update": ((GRPO, "loss"), 13, 3),  # the epoch under way is finished
    "scoring": ((killed_run, "noisy"), 7, 2),  # in a reward's thread; the epoch is left
    "rollout": (("fastflowgrpo.sampling.rollout", "sde_step"), 30, 3),
    "evaluation": (("fastflowgrpo.evaluation.sampling", "sample_ode"), 2, 3),
    "saving": ((state, "save_training"), 1, 2),
    "pictures": (("fastflowgrpo.runs.report", "image_grid"), 2, 3),
    "the end": (("fastflowgrpo.runs.report", "before_after_table"), 1, 6),
}


@pytest.mark.parametrize(
    ("place", "signum"),
    [
        *((place, signal.SIGTERM) for place in PLACES),
        *((place, signal.SIGINT) for place in list(PLACES)[:3]),
        ("rollout", signal.SIGHUP),
    ],
)
@pytest.mark.slow
def test_a_signal_saves_and_the_run_goes_on(model, whole, tmp_path, monkeypatch, capsys, place, signum):
    (owner, name), number, epochs = PLACES[place]
    owner = __import__(owner, fromlist=[name]) if isinstance(owner, str) else owner
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    arguments = command(model, tmp_path / "run")
    with monkeypatch.context() as patched:
        on_call(patched, owner, name, number, lambda: os.kill(os.getpid(), signum))
        assert main(arguments) == (128 + signum if epochs < 6 else 0)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    last = checkpoints.list_checkpoints(tmp_path / "run")[-1]
    assert json.loads((last / "manifest.json").read_text())["epoch"] == epochs
    printed = capsys.readouterr().err
    if epochs < 6:
        assert f"the last checkpoint is {last}; to go on: python -m fastflowgrpo.train --config " in printed
        assert printed.endswith("\ninterrupted\n")
    assert main(["--config", str(tmp_path / "run" / "config.yaml"), "--resume", "latest"]) == 0
    assert result(tmp_path / "run") == result(whole[4])


@pytest.mark.slow
def test_a_signal_in_the_first_epoch_leaves_nothing_to_resume_and_the_same_command_begins_anew(
    model, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        on_call(patched, EpochSampler, "sample", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(command(model, tmp_path / "run")) == 143
    assert "there is no checkpoint" in capsys.readouterr().err
    assert main(command(model, tmp_path / "run", **{"update.clip_range": 0.02})) == 2
    assert "run was made with other settings: update.clip_range was 0.01, is now 0.02" in capsys.readouterr().err
    assert main(command(model, tmp_path / "run")) == 0
    assert result(tmp_path / "run") == result(whole[4])


def test_a_second_ctrl_c_ends_at_once_and_what_a_launcher_passes_on_does_not(monkeypatch, tmp_path):
    exits, now = [], [100.0]
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with signals.Signals(Processes(make_accelerator([], str(tmp_path)))) as received:
        for later, signum in ((0, signal.SIGINT), (0.5, signal.SIGINT), (5, signal.SIGTERM)):
            now[0] += later
            signal.raise_signal(signum)
        assert exits == []
        signal.raise_signal(signal.SIGINT)
        assert exits == [130]
        with pytest.raises(signals.Interrupted) as interrupted:
            received.interruptible(lambda: pytest.fail("was called after the signal"))
        assert interrupted.value.signum == signal.SIGINT


def test_a_background_job_still_ignores_ctrl_c(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals.Signals(Processes(make_accelerator([], str(tmp_path)))) as received:
        signal.raise_signal(signal.SIGINT)
        assert received.interruptible(lambda: 1) == 1
        signal.raise_signal(signal.SIGTERM)
    assert received.signum == signal.SIGTERM


@pytest.mark.slow
def test_no_process_is_left_after_a_signal(model, tmp_path):
    """Sent to the whole process group, as by schedulers and Ctrl+C, while a reward's thread is within torch and another
    reward has processes."""
    run, log, once = tmp_path / "run", tmp_path / "run.log", tmp_path / "busy"
    rewards = json.dumps({"jpeg_compressibility": {"workers": 2}, "support.killed_run:busy": {"once": str(once)}})
    process = start(command(model, run, rewards=rewards), run)
    until(lambda: once.exists() or not process.is_alive())
    assert process.is_alive(), log.read_text()
    children = descendants(process.pid)
    assert len(children) >= 2
    os.killpg(process.pid, signal.SIGTERM)
    assert end(process) == 143, log.read_text()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    assert "--resume latest\ninterrupted\n" in log.read_text()
    assert "the process died" not in log.read_text()  # a reward's processes wait for the run to end them
    assert checkpoints.list_checkpoints(run)


def descendants(pid):
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [other for child in found for other in descendants(child)]


def until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_finished_run_is_left_as_it_is_and_can_be_made_longer(model, whole, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command(model, run, epochs=4)) == 0
    before, pictures = result(run), [run / "before_after.png", run / "summary.json"]
    for path in pictures:
        path.unlink()
    assert main(command(model, run, epochs=4)) == 0
    assert result(run) == before
    assert all(path.is_file() for path in pictures)
    assert main(command(model, run, epochs=3)) == 2
    assert "epochs: " in capsys.readouterr().err
    assert main(command(model, run)) == 0
    rows, weights, *_ = result(whole[4])
    assert "epochs was 4, is now 6" in capsys.readouterr().out
    # What the shorter run evaluated at its end drew random numbers, and its row stays.
    assert [row for row in rows_of(run) if "epoch" in row][:4] == [row for row in rows if "epoch" in row][:4]
    assert [row["step"] for row in rows_of(run)] == [0, 2, 4, 6, 6, 8, 8, 10, 12, 12]
    assert result(run)[1].keys() == weights.keys()


def test_going_back_sets_the_later_checkpoints_aside(model, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole[4], run)
    for name in ("checkpoint-8", "checkpoint-8"):
        assert main([*command(model, run), "--resume", str(run / "checkpoints" / name)]) == 0
        assert result(run) == result(whole[4])
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {f"checkpoint-{name}" for name in ("4", "8", "12", "12.set_aside", "12.set_aside1")}
    assert f"a later checkpoint is now {run}/checkpoints/checkpoint-12.set_aside1" in capsys.readouterr().out


def test_only_the_newest_checkpoints_and_the_best_are_kept(model, tmp_path):
    assert main(command(model, tmp_path / "run", save_every=1, checkpoints_total_limit=2)) == 0
    after_6, after_12 = (row["eval"]["overall"] for row in rows_of(tmp_path / "run") if "eval" in row and row["step"])
    assert after_6 > after_12
    expected = ["checkpoint-6", "checkpoint-10", "checkpoint-12"]
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "run")] == expected
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == set(expected)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a file that is too short": ("training/optimizer.safetensors", cut, "is damaged: {} has "),
    "another byte": ("training/weights.safetensors", flip, "is damaged: {} has another content than was written"),
    "a file that is missing": ("pytorch_lora_weights.safetensors", Path.unlink, "is incomplete: {} is missing"),
    "no manifest": ("manifest.json", Path.unlink, "is incomplete: {}: No such file or directory"),
    "half a manifest": ("manifest.json", cut, "is damaged: {} cannot be read"),
    "an empty manifest": ("manifest.json", lambda path: path.write_text("{}"), "is damaged: {} cannot be read"),
    "another format": (
        "manifest.json",
        lambda path: path.write_text('{"format": 99}'),
        "is of format 99, and this version reads up to 2",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_good_one_before_it_offered(
    model, whole, tmp_path, capsys, name, damage, message
):
    run = tmp_path / "run"
    shutil.copytree(whole[4], run)
    damage(run / "checkpoints/checkpoint-12" / name)
    good = run / "checkpoints/checkpoint-8"
    assert main(command(model, run)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {run}/checkpoints/checkpoint-12 {message.format(name)}")
    assert err.endswith(f"The one before it is good: --resume {good}\n")
    damage(good / name)
    damage(run / "checkpoints/checkpoint-4" / name)
    with pytest.raises(UserError, match="There is no good one before it"):
        resume.find_checkpoint(parse(command(model, run)))


def test_every_bit_of_the_manifest_that_is_flipped_is_noticed(whole, tmp_path):
    folder = tmp_path / "checkpoint-12"
    shutil.copytree(whole[4] / "checkpoints/checkpoint-12", folder)
    content = (folder / "manifest.json").read_bytes()
    checkpoints.verified_manifest(folder)
    draw = random.Random(0)
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(7)
        if not chr(content[place]).isspace():  # a white space may become another one
            (folder / "manifest.json").write_bytes(flipped)
            with pytest.raises(ValueError, match=r"^is (damaged|of format|incomplete)"):
                checkpoints.verified_manifest(folder)


def test_a_checkpoint_of_the_first_format_is_still_read(model, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[4], run)
    manifest = run / "checkpoints/checkpoint-12/manifest.json"
    content = json.loads(manifest.read_text())
    del content["sha256"]
    manifest.write_text(json.dumps(content | {"format": 1}))
    assert resume.find_checkpoint(parse(command(model, run))).epoch == 6
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is damaged"):
        resume.find_checkpoint(parse(command(model, run)))


@pytest.mark.parametrize("place", ["update", "rollout"])
def test_a_folder_that_is_removed_is_made_again_for_the_state(model, whole, tmp_path, monkeypatch, capsys, place):
    (owner, name), number, _ = PLACES[place]
    owner = __import__(owner, fromlist=[name]) if isinstance(owner, str) else owner
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        on_call(patched, owner, name, number, lambda: shutil.rmtree(run))
        assert main(command(model, run)) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert f" cannot be written: {run} is not there any more" in printed
    (checkpoint,) = checkpoints.list_checkpoints(run)
    assert f"the last checkpoint is {checkpoint}; to go on: " in printed
    assert not (run / ".lock").exists()
    assert main(["--config", str(run / "config.yaml"), "--resume", "latest"]) == 0
    assert result(run)[:2] == result(whole[4])[:2]  # the gallery was in the folder


def test_a_run_in_a_folder_that_another_process_uses_does_not_start(model, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    owner = {**RunLock(run).owner, "pid": os.getppid(), "start": lock._start(os.getppid())}
    (run / ".lock").write_text(json.dumps(owner))
    assert main(command(model, run)) == 75
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: output_dir {run} is in use by process {os.getppid()} on ")
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_out_of_memory_is_one_line_that_names_settings_and_the_run_goes_on(model, whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def short():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    with monkeypatch.context() as patched:
        on_call(patched, GRPO, "loss", 13, short)
        assert main(command(model, run)) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    told = r"error: out of memory in the phase update \(CUDA out of memory. Tried to allocate 2.00 GiB\); what helps "
    assert re.search(told + r"most: " r"\w+\.\w+ \S+ \(-\S+ MB\)", printed)
    assert main(command(model, run)) == 0
    assert result(run) == result(whole[4])


FOREIGN = {
    "another group size": ({"rollout.group_size": 2}, "rollout.group_size was 4, is now 2"),
    "another seed": ({"seed": 1}, "seed was 0, is now 1"),
    "another reward": ({"rewards": '{"ocr": 1}'}, "rewards was "),
    "another weight": ({"rewards": '{"support.killed_run:noisy": 2}'}, "rewards was "),
    "another average": ({"update.ema_decay": 0.5}, "update.ema_decay was 0.9, is now 0.5"),
    "past the end": ({"epochs": 5}, "has done, got 5"),
    "elsewhere": ({"resume": "checkpoints/checkpoint-4"}, "is not a checkpoint in output_dir"),
}


@pytest.mark.parametrize(("settings", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_checkpoint_of_another_run_is_refused(model, whole, settings, message):
    with pytest.raises(UserError, match=message):
        resume.find_checkpoint(parse(command(model, whole[4], **settings)))


def test_what_may_change_is_told(model, whole):
    reward = '{"support.killed_run:noisy": {"timeout": 3, "device": "cpu", "required": true}}'
    config = parse(command(model, whole[4], rewards=reward, epochs=9, **{"update.learning_rate": 1e-5}))
    found = resume.find_checkpoint(config)
    assert found.changed == {"epochs": (6, 9), "update.learning_rate": (3e-4, 1e-5)}
    assert (found.epoch, found.step) == (6, 12)


def test_a_chosen_micro_batch_stays_and_changes_nothing_else(model, tmp_path, capsys):
    """With another memory on resuming; the run is the one with that size from the start, bit for bit."""
    run, expected = tmp_path / "run", tmp_path / "expected"
    settings = {"update.batch_size": 0, "policy.lora_rank": 0, "policy.decode_batch_size": 1}
    settings |= {"evaluation.every": 2, "evaluation.batch_size": 4}
    assert main(command(model, run, **settings, memory_gb=0.0053, epochs=2)) == 0
    size = parse(["--config", str(run / "config.yaml")]).update.batch_size
    assert 1 < size < 8
    assert main(command(model, run, **settings, memory_gb=1, epochs=4)) == 0
    assert "update.batch_size" not in capsys.readouterr().out
    assert main(command(model, expected, **settings | {"update.batch_size": size}, epochs=4)) == 0
    assert result(run) == result(expected)


def test_other_prompts_and_other_weights_are_refused(model, whole, tmp_path, capsys):
    other = tmp_path / "model"
    shutil.copytree(model, other)
    run = tmp_path / "run"
    assert main(command(other, run, epochs=1)) == 0
    (other / "prompts.txt").write_text("\n".join(["a cow", *PROMPTS[1:]]))
    assert main(command(other, run)) == 2
    assert "is of a run with other prompts: those of prompts.train have changed" in capsys.readouterr().err
    (other / "prompts.txt").write_text("\n".join(PROMPTS))
    manifest = run / "checkpoints/checkpoint-2/manifest.json"
    saved = json.loads(manifest.read_text())
    assert main(command(other, run, **{"policy.lora_rank": 8})) == 2
    assert "policy.lora_rank was 4, is now 8" in capsys.readouterr().err
    saved["config"]["policy"]["lora_rank"] = 8
    del saved["sha256"]
    manifest.write_text(json.dumps({**saved, "sha256": checkpoints._manifest_checksum(saved)}))
    assert main(command(other, run, **{"policy.lora_rank": 8})) == 2
    named = r"is of another model: it trains transformer_blocks\S+ of shape \(4, 32\), this one of shape \(8, 32\)$"
    assert re.search(named, capsys.readouterr().err, re.MULTILINE)


def test_a_new_learning_rate_holds_after_resuming(model, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[4], run)
    config = parse(command(model, run, epochs=9, **{"update.learning_rate": 1e-5}))
    trainer = Trainer(config)
    assert [group["lr"] for group in trainer.learner.optimizer.param_groups] == [1e-5]
    assert trainer.learner.ema.optimization_step == 12
    saved = load_file(whole[4] / "checkpoints/checkpoint-12/training/weights.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in trainer.learner.named_parameters().items())


def test_a_full_disk_is_one_line_and_leaves_the_checkpoints_as_they_were(model, whole, tmp_path):
    run = tmp_path / "run"
    sizes = [path.stat().st_size for path in whole[4].glob("checkpoints/checkpoint-12/training/*.safetensors")]
    assert main(command(model, run, epochs=2)) == 0
    before = result(run)
    process = start(command(model, run), run, largest_file=max(sizes) - 1)
    assert end(process) == 2
    folder = run / "checkpoints"
    log = Path(f"{run}.log").read_text()
    assert f"error: {folder}/checkpoint-8 cannot be written: " in log
    assert f"the last checkpoint is {folder}/checkpoint-4; to go on: " in log
    assert "Traceback" not in log
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
    assert result(run)[1] == before[1]
    assert main(command(model, run)) == 0
    assert [row["step"] for row in rows_of(run)] == [0, 2, 4, 4, 6, 6, 8, 10, 12, 12]


def test_too_many_missing_scores_stop_the_run_with_a_checkpoint(model, whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        sample = EpochSampler.sample

        def without_scores(self, epoch, chosen):
            sampled = sample(self, epoch, chosen)
            if epoch == 3:
                sampled.scores.values[2:] = torch.nan
            return sampled

        patched.setattr(EpochSampler, "sample", without_scores)
        assert main(command(model, run)) == 75
    assert [path.name for path in checkpoints.list_checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]
    printed = capsys.readouterr().err
    assert f"the last checkpoint is {run}/checkpoints/checkpoint-6" in printed
    assert "error: 6 of the 8 images of epoch 3 have no score; max_missing allows a share of 0.1" in printed
    assert main(command(model, run)) == 0
    assert result(run) == result(whole[4])


@pytest.mark.parametrize(("update", "kept"), [(7, "checkpoint-6"), (8, "checkpoint-4")])
def test_a_gradient_that_is_not_finite_touches_no_good_state(model, whole, tmp_path, monkeypatch, update, kept):
    """In the first update of the fourth epoch, where the state is that after the third, and in the second."""
    run, accumulate, calls = tmp_path / "run", Learner.accumulate, []
    with monkeypatch.context() as patched:

        def poisoned(self, batch, micro_batches):
            statistics = accumulate(self, batch, micro_batches)
            calls.append(None)
            if len(calls) == update:
                self.parameters[0].grad[0] = torch.nan
            return statistics

        patched.setattr(Learner, "accumulate", poisoned)
        assert main(command(model, run)) == 2
    assert checkpoints.list_checkpoints(run)[-1].name == kept
    assert main(command(model, run)) == 0
    assert result(run) == result(whole[4])


@pytest.mark.slow
def test_tensorboard_shows_every_step_once(model, tmp_path):
    run = tmp_path / "run"
    settings = {"trackers": '["tensorboard"]', "rewards": '{"jpeg_compressibility": 1}', "evaluation.every": 0}
    process = start(command(model, run, epochs=1000, **settings), run)
    until(lambda: (run / "metrics.jsonl").exists() and len(rows_of(run)) > 4)
    process.kill()
    end(process)
    done = json.loads((checkpoints.list_checkpoints(run)[-1] / "manifest.json").read_text())["epoch"]
    time.sleep(1.1)  # TensorBoard orders a run's files by the second in which they were made
    assert main(command(model, run, epochs=done + 2, **settings)) == 0
    events = EventAccumulator(str(run / "fastflowgrpo"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [2 * (epoch + 1) for epoch in range(done + 2)]
