import json
import os
import re
import socket
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file
from support import distributed_runs
from support.distributed_runs import CONFIGS, PROMPTS, SIZE, config_of, train, z_image_config
from support.forks import FORK
from support.pipelines import tiny_sd3_pipeline, tiny_z_image_pipeline
from torch.distributed.run import get_args_parser

from fastflowgrpo.config import save
from fastflowgrpo.distributed import Processes
from fastflowgrpo.evaluate import main as evaluate
from fastflowgrpo.rewards import Scores
from fastflowgrpo.runs import checkpoints
from fastflowgrpo.scoring.gather import gather_scores

pytestmark = pytest.mark.xdist_group("distributed")  # one worker: the runs of its fixtures are made once

REWARD = "support.distributed_runs:place_reward"
TESTS = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
}
TIMEOUT = 900  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd3")
    tiny_sd3_pipeline().save_pretrained(path)
    tiny_z_image_pipeline().save_pretrained(path / "z_image")
    for place in (path, path / "z_image"):
        (place / "prompts.txt").write_text("\n".join(PROMPTS))
        for count in (3, 5):
            (place / f"{count}.txt").write_text("\n".join(PROMPTS[:count]))
    return path


def in_processes(count, output, work, *arguments):
    """Let `count` processes do the same work together, without a launcher; what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [output / f"{count}-{rank}.log" for rank in range(count)]
    members = [
        FORK.Process(target=distributed_runs.take_part, args=(rank, count, port, log, work, arguments))
        for rank, log in enumerate(logs)
    ]
    for member in members:
        member.start()
    deadline = time.monotonic() + TIMEOUT
    while any(member.is_alive() for member in members):
        wait([member.sentinel for member in members if member.is_alive()], 1)
        if any(member.exitcode for member in members) or time.monotonic() > deadline:
            for member in members:
                member.kill()
    printed = [log.read_text() for log in logs]
    assert [member.exitcode for member in members] == [0] * count, "\n".join(printed)
    return "".join(printed)


def trained_in_processes(count, folder, output, arguments=()):
    """What each of `count` processes saw, and what they printed."""
    printed = in_processes(count, output, distributed_runs.main, count, folder, output, arguments)
    return [torch.load(output / f"{count}-{rank}.pt", weights_only=False) for rank in range(count)], printed


def launch(module, *arguments):
    """A command in two processes, by accelerate's launcher."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml")]
    command += ["--num_processes", "2", "--main_process_port", "0", "-m", module, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)


def arguments_of(folder, run, mark):
    """A run with a reward that draws random numbers, and kills a process if `mark` is not there."""
    config = config_of(folder, run)
    config.rewards = {"support.distributed_runs:deadly": {"mark": str(mark), "epoch": 3}}
    config.epochs, config.save_every, config.resume, config.trackers = 5, 2, "latest", []
    config.evaluation.every, config.update.learning_rate = 0, 1e-3
    save(config, f"{run}.yaml")
    return ["--config", f"{run}.yaml"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two(folder, output):
    (output / "mark").touch()
    return trained_in_processes(2, folder, output, arguments_of(folder, output / "unbroken", output / "mark"))


@pytest.fixture(scope="module")
def four(folder, output):
    return trained_in_processes(4, folder, output)


@pytest.fixture(scope="module")
def one(folder, output):
    """The same runs in this process alone."""
    return {
        "lora": train(config_of(folder, output / "one lora", ahead=2)),
        "full": train(config_of(folder, output / "one full", rank=0)),
        "nft": train(config_of(folder, output / "one nft", algorithm="nft")),
        "z_image": train(z_image_config(folder, output / "one z_image")),
        "few": train(config_of(folder, output / "one few", updates=1, rank=0, evaluated=3)),
    }


def rows(folder):
    """A run's metrics, without its times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("wall_s", "images_per_s", "seconds")} for row in found]


def assert_close(value, expected, where="row"):
    if isinstance(expected, dict):
        assert value.keys() == expected.keys(), where
        for key in expected:
            assert_close(value[key], expected[key], f"{where}.{key}")
    else:
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-6), where


def assert_same_run(seen, one, folder, expected_folder):
    """The processes' samples, weights and rows are those of one process.

    A batch of another size may round otherwise, by some eps = 1.2e-7 in an element of a velocity. What comes of it was
    found to be below 10 eps of the change, of which 1000 are allowed.
    """
    latents = {key: value for rank in seen for key, value in rank["latents"].items()}
    assert sum(len(rank["latents"]) for rank in seen) == len(latents)
    assert latents.keys() == one["latents"].keys()
    for key, value in one["latents"].items():
        torch.testing.assert_close(latents[key], value, rtol=1e-4, atol=1e-4)
    for name in ("change", "average"):
        for rank in seen:
            assert torch.equal(rank[name], seen[0][name])
        assert one[name].norm() > 0
        assert (seen[0][name] - one[name]).norm() < 1e-4 * one[name].norm()
    assert len({tuple(rank["passes"]) for rank in seen}) == 1
    found, expected = rows(folder), rows(expected_folder)
    assert len(found) == len(expected) == 4
    for row, expected_row in zip(found, expected, strict=True):
        assert_close(row, expected_row)


@pytest.mark.parametrize("case", ["lora", "full", "nft", "z_image", "lora sharded", "full sharded", "nft sharded"])
@pytest.mark.slow
def test_two_processes_train_as_one_does(one, two, output, case):
    """3 groups for each update: 2 of one process and 1 of the other; micro-batches of 5 that do not divide their pairs;
    a group of equal rewards and a missing score; 5 evaluation prompts. The LoRA's runs sample two groups ahead."""
    kind = case.split()[0]
    seen = [rank[case] for rank in two[0]]
    assert_same_run(seen, one[kind], output / case, output / f"one {kind}")
    assert [bool(rank["sharded"]) for rank in seen] == ["sharded" in case] * 2
    row = rows(output / case)[1]
    assert (row["images"], row["missing"]) == (6 * SIZE, 1)
    assert row["trained_pairs"] == 2 * (5 * SIZE - 1)


@pytest.mark.slow
def test_four_processes_train_as_one_does(one, four, output):
    """Full training in two replicas of two shards (HSDP). Two processes have a group more; one has no evaluation
    prompt, and only accompanies the others."""
    seen = [rank["few"] for rank in four[0]]
    assert all(rank["sharded"] for rank in seen)
    assert [len(rank["latents"]) for rank in seen] == [4, 4, 2, 2]
    assert_same_run(seen, one["few"], output / "few", output / "one few")


@pytest.mark.slow
def test_each_evaluation_prompt_counts_once(one, two, four, output):
    for name, count in (("lora", 5), ("few", 3)):
        evaluation = rows(output / name)[0]["eval"]
        assert evaluation["images"] == 2 * count
        lengths = [float(len(prompt)) for prompt in PROMPTS[:count]]
        assert evaluation["scores"]["support.distributed_runs:place_reward/length"] == pytest.approx(
            sum(lengths) / count
        )
        for step in (0, rows(output / name)[-1]["step"]):
            path = f"images/step-{step:06d}.png"
            picture, expected = (
                np.asarray(Image.open(output / run / path), np.float32) for run in (name, f"one {name}")
            )
            assert abs(picture - expected).max() <= 1 < expected.std()


@pytest.mark.slow
def test_only_the_first_process_writes_and_prints(two, output):
    printed = two[1]
    trained = [name for name in two[0][0] if (output / name / "metrics.jsonl").is_file()]
    assert len(trained) >= 4
    assert printed.count("epoch   1/120") == len(trained)
    assert len(re.findall("evaluation at step 4: ", printed)) == len(trained)
    assert printed.count("epoch 5/5") == 1
    assert len(rows(output / "lora")) == 4
    error = f"output_dir {output / 'lora'} holds a run already: give another output_dir, --resume latest to go on "
    assert [rank["error"][: len(error)] for rank in two[0]] == [error] * 2


@pytest.mark.parametrize("case", ["lora", "full", "nft", "lora sharded", "full sharded", "nft sharded"])
@pytest.mark.slow
def test_a_resumed_run_goes_on_as_the_one_that_was_not_left(two, case):
    for rank in two[0]:
        unbroken, resumed = rank[case]["gone on"].T
        assert torch.equal(unbroken, resumed)


@pytest.mark.slow
def test_what_ends_one_process_ends_all_with_what_they_have(two):
    assert two[0][0]["ends"] == [
        "FailedElsewhere: process 1 failed: OSError: no space, True",
        "Interrupted: SIGTERM, True",
        "nothing",
    ]
    assert two[0][1]["ends"] == ["OSError: no space, True", "Interrupted: SIGTERM, True", "nothing"]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.slow
def test_sharded_weights_are_saved_whole(one, two, output, folder, kind):
    name = "pytorch_lora_weights.safetensors" if kind == "lora" else "transformer/diffusion_pytorch_model.safetensors"
    saved, expected = (
        load_file(output / case / "checkpoints/checkpoint-4" / name) for case in (f"{kind} sharded", f"one {kind}")
    )
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(saved[key], tensor, rtol=1e-3, atol=1e-5)
    if kind == "lora":
        pipe = StableDiffusion3Pipeline.from_pretrained(folder)
        pipe.load_lora_weights(output / "lora sharded/checkpoints/checkpoint-4")
        assert any(p.any() for name, p in pipe.transformer.named_parameters() if "lora_B" in name)


@pytest.mark.slow
def test_sharded_bfloat16_weights_keep_a_float32_adapter_and_a_ratio_of_one(two):
    for rank in two[0]:
        assert rank["dtypes"] == {torch.bfloat16, torch.float32}
        assert (rank["ratio"] == 1).all()
        assert rank["update"] == two[0][0]["update"]
        assert rank["update"]["grad_norm"] > 0


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(two, output, tmp_path):
    """5 prompts, 3 of one process and 2 of the other; missing scores."""
    command = [
        "--run",
        str(output / "unbroken"),
        "--rewards",
        '{"support.distributed_runs:place_reward": 1}',
        "--output_dir",
    ]
    assert evaluate([*command, str(output / "one evaluation")]) == 0
    printed = in_processes(2, tmp_path, distributed_runs.command, "evaluate", [*command, str(output / "evaluation")])
    assert printed.count("| Diversity | base | trained | difference | missing |") == 1
    names = ("evaluation", "one evaluation")
    found, expected = (json.loads((output / name / "evaluation.json").read_text()) for name in names)
    assert (found["processes"], expected["processes"]) == (2, 1)
    for column in ("base", "trained", "difference"):
        assert_close(found[column], expected[column])
    assert found["base"]["Scores"]["reward"]["missing"] == 1
    assert found["difference"]["Diversity"]["latents"]["mean"] != 0
    pictures = [np.asarray(Image.open(output / name / "grid.png"), int) for name in names]
    assert abs(pictures[0] - pictures[1]).max() <= 1 < pictures[0].std()


@pytest.mark.slow
def test_a_run_of_which_a_process_is_killed_stops_and_once_resumed_is_the_unbroken_one(folder, two, output, tmp_path):
    broken = tmp_path / "run"
    arguments = arguments_of(folder, broken, tmp_path / "mark")
    assert launch("fastflowgrpo.train", *arguments).returncode != 0
    assert checkpoints.list_checkpoints(broken)[-1].name == "checkpoint-4"
    printed = in_processes(2, tmp_path, distributed_runs.command, "train", arguments)
    last = checkpoints.list_checkpoints(broken)[-1].name
    assert last == "checkpoint-10" and "goes on from" in printed
    assert rows(broken) == rows(output / "unbroken")
    files = [path.relative_to(broken) for path in broken.glob(f"checkpoints/{last}/**/*.safetensors")]
    assert len(files) == 5  # the weights, averaged and raw, for diffusers and for training, and the optimiser's
    for path in files:
        saved, expected = (load_file(run / path) for run in (broken, output / "unbroken"))
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    path = Path("checkpoints", last, "training", "rng.json")
    states, expected = (json.loads((run / path).read_text()) for run in (broken, output / "unbroken"))
    assert states == expected and states[0] != states[1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("total", [1, 3, 6, 12])
def test_shares(ranks, total):
    class Rank:
        process_index, num_processes, distributed_type = 0, ranks, None

    shares = []
    for Rank.process_index in range(ranks):
        ranks_view = Processes(Rank)
        own, padded = ranks_view.rank_indices(total), ranks_view.padded_rank_indices(total)
        assert padded[: len(own)] == own
        assert len(padded) == -(-total // ranks)
        assert all(0 <= index < total for index in padded)
        for begin in range(total + 1):
            for end in range(begin, total + 1):
                assert own[ranks_view.local_slice(begin, end)] == [index for index in own if begin <= index < end]
        shares.append(own)
    assert sorted(index for own in shares for index in own) == list(range(total))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [1, 3, 6, 12])
def test_what_is_gathered_is_in_the_order_of_the_things(ranks, total, monkeypatch):
    class Rank:
        process_index, num_processes, distributed_type = 0, ranks, None

    sent = []

    def gather(self, value):
        """The first call of each rank leaves its value; the next ones get them all."""
        if len(sent) < ranks:
            sent.append(value)
            raise InterruptedError
        return sent

    monkeypatch.setattr(Processes, "gather", gather)
    number = torch.arange(total * 2).view(total, 2).float()  # two copies of each thing
    for collect in (
        lambda view, mine: view.gather_rows({"number": mine}, total)["number"],
        lambda view, mine: gather_scores(view, Scores(mine.flatten(), {}), total, 2).values.view(total, 2),
        lambda view, mine: (
            gather_scores(view, Scores(-mine.flatten(), {"number": mine.flatten()}), total, 2)
            .details["number"]
            .view(total, 2)
        ),
    ):
        sent.clear()
        for Rank.process_index in range(ranks):
            view = Processes(Rank)
            with pytest.raises(InterruptedError):
                collect(view, number[view.padded_rank_indices(total)])
        assert torch.equal(collect(view, number[view.padded_rank_indices(total)]), number)


def launched(name, *arguments):
    parser = launch_command_parser()
    command = ["--config_file", str(CONFIGS / name), *arguments, "-m", "fastflowgrpo.train", "--seed", "1"]
    parsed = _validate_launch_command(parser.parse_args(command))[0]
    assert (parsed.training_script, parsed.training_script_args) == ("fastflowgrpo.train", ["--seed", "1"])
    assert parsed.mixed_precision == "no"
    return parsed


def test_the_launch_configs_say_what_they_are_for():
    assert {path.name for path in CONFIGS.iterdir()} == {
        "ddp.yaml",
        "fsdp2.yaml",
        "hsdp.yaml",
        "multi_node.yaml",
        "one_gpu.yaml",
        "slurm.sh",
    }
    one = launched("one_gpu.yaml")
    assert not (one.multi_gpu or one.use_fsdp) and one.num_processes == 1
    ddp = launched("ddp.yaml")
    prepare_multi_gpu_env(ddp)
    assert ddp.multi_gpu and (ddp.nproc_per_node, ddp.num_machines) == ("8", 1)
    nodes = launched("multi_node.yaml", "--machine_rank", "2", "--main_process_ip", "node1")
    prepare_multi_gpu_env(nodes)
    assert (nodes.nnodes, nodes.nproc_per_node, nodes.node_rank, nodes.rdzv_endpoint) == ("3", "8", 2, "node1:29500")
    sharded = launched("fsdp2.yaml")
    environment = prepare_multi_gpu_env(sharded)
    assert (environment["FSDP_VERSION"], environment["ACCELERATE_USE_FSDP"]) == ("2", "true")
    replicated = launched("hsdp.yaml", "--machine_rank", "2", "--main_process_ip", "node1")
    environment = prepare_multi_gpu_env(replicated)
    sizes = [int(environment[f"PARALLELISM_CONFIG_DP_{name}_SIZE"]) for name in ("REPLICATE", "SHARD")]
    assert sizes == [replicated.num_machines, int(replicated.nproc_per_node)] == [3, 8]


def test_the_slurm_script_starts_a_process_per_gpu_on_each_node(tmp_path):
    for name, line in (("scontrol", "printf 'node7\\nnode8\\n'"), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_NODELIST": "node[7-9]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "5",
    }
    environment = {**os.environ, **job, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", CONFIGS / "slurm.sh", "--seed", "1"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    first, program, *arguments = done.stdout.splitlines()
    assert (first, program) == ("--kill-on-bad-exit=1", "torchrun")
    parsed = get_args_parser().parse_args(arguments)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("3", "8", "node7:29500")
    assert (parsed.module, parsed.training_script) == (True, "fastflowgrpo.train")
    assert parsed.training_script_args == ["--seed", "1"]
