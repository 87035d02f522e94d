"""Steps in the host's memory give the update the same bits."""

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_run import command

from fastflowgrpo import Trainer
from fastflowgrpo.config import parse
from fastflowgrpo.learning.step_reader import StepReader
from fastflowgrpo.runs.checkpoints import list_checkpoints
from fastflowgrpo.sampling.host_trajectory import HostTrajectory

SETTINGS = {
    "guidance": {"rollout.guidance_scale": 2, "rollout.keep_unconditional": True},
    "guard": {"update.algorithm": "grpo_guard"},
}


def trained(folder, output, monkeypatch, **settings):
    """The last checkpoint's tensors of a run, and the number of micro-batches that were read ahead and asked for."""
    settings = {
        "rollout.batch_size": 4,
        "update.per_epoch": 1,
        "update.batch_size": 4,
        "update.kl_weight": 0,
        "evaluation.num_steps": 1,
        "evaluation.images_per_prompt": 1,
        "epochs": 1,
        **settings,
    }
    calls = {"prefetch": 0, "read": 0}
    for name in calls:
        function = getattr(StepReader, name)

        def counted(self, *arguments, name=name, function=function):
            calls[name] += 1
            return function(self, *arguments)

        monkeypatch.setattr(StepReader, name, counted)
    trainer = Trainer(parse(command(folder, output, **settings)))
    trainer.run()
    (checkpoint,) = list_checkpoints(output)
    monkeypatch.undo()
    return load_file(checkpoint / "training/weights.safetensors"), calls


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_update_from_the_host_has_the_same_bits(tiny_sd3_folder, tmp_path, monkeypatch, kind):
    plain, _ = trained(tiny_sd3_folder, tmp_path / "plain", monkeypatch, **SETTINGS[kind])
    offloaded = {**SETTINGS[kind], "rollout.offload_trajectory": True}
    found, calls = trained(tiny_sd3_folder, tmp_path / "offloaded", monkeypatch, **offloaded)
    assert plain.keys() == found.keys() and all(torch.equal(plain[name], found[name]) for name in plain)
    # 4 micro-batches, of which 3 were read ahead; the replay reads two and the first micro-batch when they are needed
    assert calls == {"prefetch": 6, "read": 6}


def test_only_the_steps_are_moved(tiny_sd3_folder, monkeypatch, tmp_path):
    parts = []
    of = HostTrajectory.of
    monkeypatch.setattr(HostTrajectory, "of", lambda part: parts.append(part) or of(part))
    trained(tiny_sd3_folder, tmp_path / "run", monkeypatch, **{"rollout.offload_trajectory": True})
    joined = HostTrajectory.cat([of(part) for part in parts])
    assert type(joined) is HostTrajectory and len(parts) == 2
    assert torch.equal(joined.latents, torch.cat([part.latents for part in parts]))
    assert joined.final.data_ptr() != joined.latents.data_ptr()
