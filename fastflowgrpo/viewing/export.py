"""The pages as files that any web host serves, and that open from the disk."""

import shutil
from pathlib import Path

from fastflowgrpo.errors import UserError
from fastflowgrpo.viewing.assets import DATA, PAGES, data_script
from fastflowgrpo.viewing.contents import RunFolder


def export(runs: list[RunFolder], site: Path) -> int:
    """Write the pages of runs, with their images, into a folder.

    Args:
        runs: to show.
        site: the folder; an earlier export in it is replaced.

    Returns:
        The size of the files in bytes.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    if site.exists() and not (site.is_dir() and ((site / DATA).is_file() or not any(site.iterdir()))):
        raise UserError(f"export: {site} is there already and is no export: give another folder")
    contents = [run.contents() for run in runs]
    try:
        shutil.rmtree(site / "runs", ignore_errors=True)
        shutil.copytree(PAGES, site, dirs_exist_ok=True)
        (site / DATA).write_bytes(data_script(contents, live=False))
        for number, (run, content) in enumerate(zip(runs, contents, strict=True)):
            for entry in [*content["evaluations"], *content["rollouts"]]:
                target = site / "runs" / str(number) / entry["folder"]
                for image in entry.get("images") or entry["groups"]:
                    for file in {image["file"], image.get("source", image["file"])}:
                        path = run.image(entry["folder"], file)
                        if path is not None:
                            target.mkdir(parents=True, exist_ok=True)
                            shutil.copyfile(path, target / path.name)
    except OSError as error:
        raise UserError(f"export: {site} cannot be written: {error.strerror}") from error
    return sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
