"""The benchmarks run and report what they say; nothing here measures a time."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch._inductor.exc import InductorError

from benchmarks import conftest, epoch, generalisation, memory, ocr, report, scaling
from benchmarks.faults import __main__ as faults_main
from benchmarks.faults import cases as faults_cases
from benchmarks.random_sd35 import PUBLISHED, random_sd35
from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.policy import load_policy
from fastflowgrpo.policy.sd3 import SD3Policy

GROUPS, SIZE, STEPS = 2, 4, 6
IMAGES = GROUPS * SIZE


def test_epoch_measures_loops_of_the_same_gradient(tmp_path, capsys, monkeypatch):
    output = tmp_path / "epoch.json"
    sizes = {"prompts.per_epoch": GROUPS, "rollout.group_size": SIZE, "rollout.num_steps": STEPS}
    sizes |= {"rollout.batch_size": IMAGES // 2, "update.batch_size": IMAGES // 2}
    settings = [f"--{name}={value}" for name, value in sizes.items()]
    settings += ["--rewards", '{"support.distributed_runs:redness": 1}', "--rollout.window_start", "[2, 3]"]
    settings += ["--policy.compile=true"]
    monkeypatch.setattr(SD3Policy, "_compile", lambda policy: None)  # takes long, and the tests of the policy cover it
    epoch.main(["--repeats", "1", "--output", str(output), *settings])
    result = json.loads(output.read_text())
    assert "images/s" in capsys.readouterr().out
    assert result["matrix_tflop_per_s"] > 0
    paper, window = result["recipes"]
    # (sample, step) pairs; the paper's passes are conditional and not, and those of the reference
    pairs = IMAGES * (STEPS - 1)
    assert paper["loops"]["ours"]["passes"] == {"forward": 2 * IMAGES * STEPS + 3 * pairs, "forward_backward": pairs}
    assert paper["loops"]["eager"]["passes"] == {
        "forward": 2 * IMAGES * STEPS + 2 * pairs,
        "forward_backward": 2 * pairs,
    }
    # one pair of each micro-batch of 4 has a KL
    assert paper["loops"]["lean"]["passes"] == {
        "forward": 2 * IMAGES * STEPS + 2 * (pairs // 4),
        "forward_backward": pairs,
    }
    assert 1e-3 < paper["lean_gradient_difference"] < 0.1 and window["lean_gradient_difference"] is None
    for name in ("ours", "eager"):
        assert window["loops"][name]["passes"] == {"forward": IMAGES * STEPS, "forward_backward": 3 * IMAGES}
    # two steps before the window and its first step for one image of each group, and one step after it
    assert window["loops"]["lean"]["passes"] == {
        "forward": 3 * GROUPS + 3 * IMAGES,
        "forward_backward": GROUPS + 2 * IMAGES,
    }
    for recipe in (paper, window):
        assert recipe["images"] == IMAGES
        assert 0 < recipe["relative_gradient_difference"] < 1e-4
        assert 0 < recipe["compiled_gradient_difference"] < 1e-4
        assert recipe["loops"]["compiled"]["passes"] == recipe["loops"]["ours"]["passes"]
        flops = recipe["flops_per_pass"]
        assert 2 * flops["forward"] < flops["forward_backward"] < 3 * flops["forward"]
        for loop in recipe["loops"].values():
            assert set(loop["seconds"]) == {"encode", "rollout", "decode", "score", "update"}
            done = sum(count * flops[kind] for kind, count in loop["passes"].items()) / 1e12
            assert loop["tflop_per_s"] == pytest.approx(done / (loop["seconds"]["rollout"] + loop["seconds"]["update"]))
    assert "| paper | eager |" in report.report(tmp_path)


def test_memory_is_measured_beside_its_estimate(tmp_path, monkeypatch, capsys):
    gpu = {"is_available": True, "get_device_name": "A GPU", "max_memory_allocated": 3_000_000_000}
    gpu |= {"synchronize": None, "reset_peak_memory_stats": None}
    functions = {name: lambda value=value: value for name, value in gpu.items()}
    monkeypatch.setattr(memory, "torch", SimpleNamespace(cuda=SimpleNamespace(**functions)))
    small = ["--prompts.per_epoch=2", "--rollout.group_size=2", "--rollout.batch_size=4", "--update.per_epoch=1"]
    memory.main([*small, "--repeats=2", f"--output={tmp_path / 'memory.json'}"])
    result = json.loads((tmp_path / "memory.json").read_text())
    assert result["measured_gb"] == 3 and 0 < result["estimated_gb"] < 1 and len(result["epochs"]) == 2
    assert result["epochs"][0]["ratio_min"] == pytest.approx(1, abs=1e-5)
    assert "A GPU: 3.00 GB at most, estimated 0." in capsys.readouterr().out


def test_random_sd35_is_the_published_size_and_loads(tmp_path):
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**PUBLISHED["transformer"])
    assert sum(p.numel() for p in transformer.parameters()) == 2_243_171_520

    small = {name: dict(config) for name, config in PUBLISHED.items()}
    small["transformer"] |= {"num_layers": 2, "dual_attention_layers": (0,), "attention_head_dim": 8}
    small["transformer"] |= {"caption_projection_dim": 24 * 8, "joint_attention_dim": 80, "pooled_projection_dim": 64}
    small["transformer"] |= {"sample_size": 4, "pos_embed_max_size": 8}
    small["vae"] |= {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    for name in ("text_encoder", "text_encoder_2"):
        small[name] |= {"hidden_size": 40, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 1}
        small[name] |= {"projection_dim": 32, "vocab_size": 600}
    small["text_encoder_2"] |= {"num_attention_heads": 2}
    random_sd35("cpu", torch.bfloat16, small).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), PolicyConfig(dtype="bfloat16", lora_rank=4, max_sequence_length=256))
    conditioning = policy.encode(["a red circle"])
    assert conditioning["encoder_hidden_states"].shape == (1, 77 + 256, 80)
    latents = torch.randn(1, 16, 4, 4, dtype=torch.bfloat16)
    velocity = policy.velocity(latents, torch.ones(1), conditioning)
    assert velocity.shape == latents.shape and velocity.isfinite().all() and velocity.std() > 0
    assert policy.decode(latents).shape == (1, 3, 32, 32)
    assert policy.pipeline.scheduler.config.shift == 3


def benchmark_file(tests):
    """JSON in pytest-benchmark's layout: (name, parameters, median in seconds, extra_info) of each test."""
    return {
        "machine_info": {"machine": "x86_64", "cpu": {"brand_raw": "A CPU"}},
        "benchmarks": [
            {"name": f"{name}[id]", "params": params, "stats": {"median": median}, "extra_info": info}
            for name, params, median, info in tests
        ],
    }


def on_gpu(milliseconds):
    return {"gpu": "A GPU", "torch": "2", "device_ms": milliseconds, "gb_per_s": 2, "share_of_copy": 0.5, "peak_mb": 3}


STEP = [
    ("test_step", {"size": "small", "work": "draw", "variant": variant}, 0.004, on_gpu(milliseconds))
    for variant, milliseconds in (("eager", 2.0), ("compile", 0.5), ("triton", 0.25))
]
ADVANTAGES = [
    ("test_group_advantages", {"rows": 1152, "method": method, "order": "grouped"}, median, {"ns_per_sample": 8.5})
    for method, median in (("loop", 0.3), ("native", 0.01))
]


def test_weights_are_mixed_with_those_of_the_base():
    policy, base = (SimpleNamespace(module=torch.nn.Linear(2, 3)) for _ in range(2))
    pairs = zip(policy.module.state_dict().values(), base.module.state_dict().values(), strict=True)
    expected = [1.5 * trained - 0.5 * of_base for trained, of_base in pairs]
    generalisation.mix(policy, base, 1.5)
    for parameter, value in zip(policy.module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_scaling_measures_each_exchange(tmp_path):
    arguments = Namespace(parameters=100_000, groups=2, group_size=4, epochs=1)
    assert scaling.measure(arguments, tmp_path / "times.json").code == 0
    times = json.loads((tmp_path / "times.json").read_text())
    assert list(times) == ["scores", "advantages", "gradient", "statistics"]
    assert all(time > 0 for taken in times.values() for time in taken.values())


def test_report_of_whatever_is_there(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(benchmark_file(STEP)))
    (tmp_path / "b.json").write_text(json.dumps(benchmark_file(ADVANTAGES)))
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "d.json").write_text("{")
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    assert "## step draw" in lines and "## group_advantages grouped" in lines
    assert "| small | triton | 0.2500 | 4.0000 | 2 | 50% | 3 | 8 | 2 |" in lines
    assert "| small | eager | 2.0000 | 4.0000 | 2 | 50% | 3 | 1 | 0.25 |" in lines
    assert "| 1152 | native | 8.5 | 30 |" in lines
    assert "a.json: A GPU, torch 2, 3 benchmarks." in lines and "b.json: A CPU, 2 benchmarks." in lines
    assert "c.json is not a result of a benchmark, and left out." in lines
    assert any(line.startswith("d.json is not JSON") for line in lines)
    drawn = find_spec("matplotlib") is not None
    assert (tmp_path / "speed.png").exists() == drawn
    assert ("![Speed relative to the baseline](speed.png)" if drawn else "The plot needs matplotlib") in text


def test_ocr_measures_both_readers_on_the_same_images(tmp_path, capsys):
    images = list(ocr.rendered(2, [ocr.pillow_font]))
    assert [image.kind for image in images] == [*ocr.KINDS] * 2
    assert all(image.pixels.shape == (3, 512, 512) and image.pixels.float().std() > 1 for image in images)
    assert len({image.prompt for image in images}) > len(ocr.KINDS), "others in each round"
    assert torch.equal(next(ocr.rendered(1, [ocr.pillow_font])).pixels, images[0].pixels)
    first = ocr.quoted_text(images[0].prompt)
    found = ocr.measure(images, {"one": lambda pixels: first, "none": lambda pixels: ""})
    assert found["none"]["mean"] == found["none"]["exact"] == 0 and found["one"]["images_per_s"] > 0
    assert found["one"]["exact"] == 1 / len(images) and found["one"]["kinds"]["plain"] >= 0.5
    result = {"images": 20, "side": 512, "versions": {"rapidocr": "3"}, "readers": found}
    (tmp_path / "ocr.json").write_text(json.dumps(result))
    text = report.report(tmp_path)
    assert "ocr.json: one thread, 512 px; rapidocr 3" in text and "| none | 20 |" in text and "| 5.0% |" in text


def test_report_without_a_baseline(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(benchmark_file(STEP[2:])))
    assert "| small | triton | 0.2500 | 4.0000 | 2 | 50% | 3 |  |  |" in report.report(tmp_path).splitlines()


def test_report_without_results(tmp_path, capsys):
    (tmp_path / "c.json").write_text("{}")
    assert report.main([str(tmp_path)]) == 1
    assert f"{tmp_path}: no JSON of pytest-benchmark, benchmarks.epoch or benchmarks.ocr" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


def test_a_session_out_of_time_ends_by_itself(tmp_path):
    (tmp_path / "test_two.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "--seconds=0", tmp_path]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # to import less
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    assert result.returncode == pytest.ExitCode.INTERRUPTED, result.stdout + result.stderr
    assert "out of time" in result.stdout and "1 passed" in result.stdout


@pytest.mark.parametrize("variant, raised", [("compile", pytest.skip.Exception), ("eager", InductorError)])
def test_only_a_baseline_that_torch_cannot_compile_is_left_out(variant, raised):
    call = conftest.pytest_runtest_call(SimpleNamespace(callspec=SimpleNamespace(params={"variant": variant})))
    next(call)
    with pytest.raises(raised, match="RuntimeError: no kernel"):
        call.throw(InductorError(RuntimeError("no kernel"), None))


def test_there_are_two_hundred_faults_with_different_names():
    cases = faults_cases.all_cases()
    assert len({(case.group, case.name) for case in cases}) == len(cases) >= 200
    assert sum(case.group == "random kills" for case in cases) == 100


@pytest.mark.slow
@pytest.mark.xdist_group("resume")  # forks from the same process, which has imported everything
def test_a_fault_is_tried_on_a_real_run_and_a_loss_is_reported(tmp_path, monkeypatch, capsys):
    def lost(place):
        faults_cases.check(False, "the run | was lost")

    (case,) = [case for case in faults_cases.all_cases() if case.name == "an owner elsewhere that is silent"]
    cases = [case, faults_cases.Case("lock", "another", "exit 0", lost)]
    monkeypatch.setattr(faults_main, "all_cases", lambda: cases)
    output = tmp_path / "faults.md"
    assert faults_main.main(["--output", str(output)]) == 1
    assert "2 cases, 1 survived as expected, 1 lost" in capsys.readouterr().out
    table = output.read_text()
    assert "| lock | 2 | 1 |" in table
    assert "| lock: another | exit 0 | **lost** | the run / was lost |" in table
    assert f"| lock: {case.name} | exit 0 | survived | exit 0 |" in table
