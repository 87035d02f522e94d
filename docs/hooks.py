"""The site has the repository's links: what a page links to outside docs/ is published with it.

Links are written for GitHub, relative to the file that they stand in. `PAGES` become pages of the site; any other
linked file is copied to `source/`. A link to a file that is not there is an error.

`example/` of the site is the export of the run in example_run.zip by `python -m fastflowgrpo.view`.
"""

import posixpath
import re
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from fastflowgrpo.viewing.contents import RunFolder
from fastflowgrpo.viewing.export import export

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = Path(__file__).with_name("example_run.zip")
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")


def on_files(files, config):
    """Add the pages that stand outside docs/."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at the same files within the site."""
    source = Path(page.file.abs_src_path)

    def resolve(match):
        link = urlsplit(match[0])
        if link.scheme or not link.path:
            return match[0]
        path = (source.parent / link.path).resolve()
        uri = site_uri(path, Path(config.docs_dir).resolve())
        if not path.is_file():
            raise PluginError(f"{source.relative_to(ROOT)}: there is no {link.path}")
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return relative + (f"#{link.fragment}" if link.fragment else "")

    return LINK.sub(resolve, markdown)


def on_post_build(config):
    """Export the example run into the site."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(EXAMPLE).extractall(folder)
        (run,) = Path(folder).iterdir()
        export([RunFolder(run, run.name)], Path(config.site_dir) / "example")


def site_uri(path, docs):
    """Where a file of the repository is in the site."""
    if path.is_relative_to(docs):
        return path.relative_to(docs).as_posix()
    name = path.relative_to(ROOT).as_posix()
    return name if name in PAGES else f"source/{name}"
