"""The command line of a run of a tiny pipeline, and the rows that it logs."""

import json
from pathlib import Path
from typing import Any


def command(folder: Path, output: Path, **settings: Any) -> list[str]:
    """The settings of a run of 2 epochs, by dotted name, then the given ones. The prompts lie beside the folder."""
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a cat\ntwo dogs\nsnow\na ball")
    settings = {
        "model": folder,
        "output_dir": output,
        "trackers": "[]",
        "prompts.train": prompts,
        "prompts.per_epoch": 2,
        "rewards": '{"jpeg_compressibility": 1}',
        "policy.lora_rank": 4,
        "policy.max_sequence_length": 8,
        "rollout.group_size": 4,
        "rollout.batch_size": 8,
        "rollout.num_steps": 4,
        "rollout.window_size": 2,
        "rollout.window_start": "[0,2]",
        "update.batch_size": 8,
        "update.kl_weight": 0.1,
        "update.learning_rate": 1e-2,
        "evaluation.every": 0,
        "evaluation.num_steps": 2,
        "evaluation.images_per_prompt": 2,
        "epochs": 2,
        **settings,
    }
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row.keys() - {"wall_s", "seconds", "images_per_s"}} for row in read]
