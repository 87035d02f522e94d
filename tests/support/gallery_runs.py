"""Folders of runs as training writes them, with small images, for the viewer's tests; and its server in a thread."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from fastflowgrpo.viewing.contents import named_runs
from fastflowgrpo.viewing.server import listen, view_server

TAGS = ("counting", "colors")
HOSTILE = [
    "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">",
    "\"quotes\" 'single' & </script> ${1} `back` \\ \u2028",
    "word " * 2000,
    "\u202eשלום عالم",
    "👩‍🚀🏳️‍🌈 emoji",
]


@contextmanager
def served(*folders: Path) -> Iterator[tuple[str, int]]:
    """The host and the port of a server of these runs."""
    server = view_server(named_runs(list(folders)))
    with listen(0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


def make_run(
    folder: Path,
    steps: tuple[int, ...] = (0, 4, 8),
    prompts: list[str] | None = None,
    clip: float = 0.01,
    edits: bool = False,
) -> Path:
    """A run with an evaluation at each step, an epoch between two evaluations, and a group of each epoch.

    With `edits` every prompt has a source image, which is white.
    """
    folder.mkdir(parents=True)
    rewards = '{geneval: {weight: 1.0, url: "http://secret:1/"}}'
    evaluation = '{gallery: 48, guard: {deqa: {base_url: "http://secret:2/", api_key_env: secret}}}'
    (folder / "config.yaml").write_text(
        f"output_dir: /home/someone/run\nrewards: {rewards}\nupdate: {{clip_range: {clip}}}\nevaluation: {evaluation}\n"
    )
    for number, step in enumerate(steps):
        add_evaluation(
            folder, number, step, prompts or ["three red circles", "a green square", "two blue crosses"], edits
        )
        if number:
            add_epoch(folder, number - 1, step, edits)
    return folder


def add_evaluation(folder: Path, number: int, step: int, prompts: list[str], edits: bool = False) -> None:
    """An evaluation whose images have the colour 40 * number, and are correct from the second evaluation on."""
    images = []
    for i, text in enumerate(prompts):
        correct = number > 0 or i == 0
        score = min(1.0, 0.25 * (number + i))
        images.append(
            {
                "file": f"{i}-0.webp",
                "prompt": i,
                "text": text,
                "tag": TAGS[i % 2],
                "seed": "1234567890123456789",
                "scores": {"reward": score, "geneval/strict": float(correct)},
                "correct": correct,
                "detections": [
                    {"by": "geneval", "label": "<b>red</b> circle", "score": 0.9, "box": [0.1, 0.2, 0.5, 0.6]}
                ],
            }
        )
        _save(folder, f"step-{step:06d}", f"{i}-0.webp", 40 * number)
        if edits:
            images[-1]["source"] = f"{i}-source.webp"
            _save(folder, f"step-{step:06d}", f"{i}-source.webp", 255)
    _append(folder / "gallery/index.jsonl", _entry("evaluation", f"step-{step:06d}", step, number, images=images))
    evaluation = {"overall": 0.5 + 0.1 * number, "diversity": 0.2, "scores": {"reward": 0.5 + 0.1 * number}}
    _append(folder / "metrics.jsonl", {"step": step, "eval": evaluation, "wall_s": 10.0 * number})


def add_epoch(folder: Path, epoch: int, step: int, edits: bool = False) -> None:
    """An epoch with one group of four images."""
    row = {
        "reward": 0.4 + 0.1 * epoch,
        "images": 4,
        "kl": 0.001,
        "clipped_above": 0.1,
        "clipped_below": 0.1,
        "my_metric": 3,
    }
    _append(folder / "metrics.jsonl", {"epoch": epoch, "step": step, **row, "seconds": {"rollout": 2.0}, "wall_s": 5.0})
    group = {
        "file": "0.webp",
        "columns": 2,
        "text": f"a group of epoch {epoch}",
        "tag": "colors",
        "seed": "7",
        "advantages": [1.5, 0.25, -0.5, None],
        "scores": {"reward": [1.0, 0.5, 0.25, None]},
    }
    _save(folder, f"epoch-{epoch:06d}", "0.webp", 100)
    if edits:
        group["source"] = "0-source.webp"
        _save(folder, f"epoch-{epoch:06d}", "0-source.webp", 255)
    _append(folder / "gallery/index.jsonl", _entry("rollout", f"epoch-{epoch:06d}", step, epoch, groups=[group]))


def _entry(kind: str, folder: str, step: int, epoch: int, **content) -> dict:
    return {"folder": folder, "time": 1.0, "kind": kind, "step": step, "epoch": epoch, **content}


def _save(folder: Path, name: str, file: str, grey: int) -> None:
    (folder / "gallery" / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (grey,) * 3).save(folder / "gallery" / name / file, lossless=True)


def _append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
