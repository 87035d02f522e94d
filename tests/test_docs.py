"""Links of the documentation lead somewhere, and what is made from the code is current. `mkdocs build --strict`, in
.ci/run, checks the site."""

import json
import re
import runpy
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import fastflowgrpo
from benchmarks import learning_report

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_are_not_broken(page):
    links = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', page.read_text())
    paths = [urlsplit(link or image) for link, image in links]
    assert [link.path for link in paths if not link.scheme and not (page.parent / link.path).exists()] == []


def test_the_picture_of_the_rooms_is_current():
    architecture = runpy.run_path(str(ROOT / "docs/architecture.py"))
    picture = architecture["draw"](architecture["reduced"](architecture["imports"]()))
    assert architecture["PICTURE"].read_text() == picture, "run python docs/architecture.py"


def test_the_page_of_the_rooms_names_each():
    page = (ROOT / "docs/architecture.md").read_text()
    rooms = runpy.run_path(str(ROOT / "docs/architecture.py"))["PLACES"]
    assert [room for room in rooms if f"`{room}`" not in page] == []


def test_the_api_has_every_public_name():
    documented = re.findall(r"^::: \S*?(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert set(fastflowgrpo.__all__) <= set(documented)


@pytest.mark.parametrize(
    "page, written", [("README.md", learning_report.summary), ("docs/learning.md", learning_report.tables)]
)
def test_the_tables_of_the_learning_benchmark_are_current(page, written):
    text, results = (ROOT / page).read_text(), ROOT / "benchmarks/results" / learning_report.RESULTS
    begin, end = text.index(learning_report.BEGIN) + len(learning_report.BEGIN), text.index(learning_report.END)
    expected = written(json.loads(results.read_text())) if results.is_file() else ""
    assert text[begin:end].strip() == expected.strip(), "run python -m benchmarks.learning --report --publish"
