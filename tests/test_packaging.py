"""The wheel of the sdist has every module, the C++ extension and the bundled world, and works unpacked. The wheel of
the checkout is built without a compiler: building the extension takes most of the time, and once is enough."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import fastflowgrpo

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]
ROOT = Path(__file__).parents[1]
EXTENSION = f"fastflowgrpo/_native{sysconfig.get_config_var('EXT_SUFFIX')}"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command, with nothing of this checkout on its path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    result = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(source: Path, target: Path, **environment: str) -> zipfile.ZipFile:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    run("-m", "pip", "wheel", *options, target, source, cwd=target.parent, **environment)
    (wheel,) = target.iterdir()
    return zipfile.ZipFile(wheel)


def package_files(names) -> set[str]:
    return {name for name in names if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the tree, since building writes into it."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    leftovers = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*leftovers))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout) -> zipfile.ZipFile:
    run("-c", "from setuptools import build_meta; build_meta.build_sdist('../sdist')", cwd=checkout)
    (sdist,) = (checkout.parent / "sdist").iterdir()
    return build_wheel(sdist, checkout.parent / "wheel")


def test_wheel_is_the_whole_package_and_nothing_else(checkout, wheel):
    walk = os.walk(checkout / "fastflowgrpo", followlinks=True)
    files = {Path(folder, name).relative_to(checkout).as_posix() for folder, _, names in walk for name in names}
    assert package_files(wheel.namelist()) == files | {EXTENSION}
    assert {"fastflowgrpo/kernels/sde_step.py", "fastflowgrpo/shapes/pipeline/model_index.json"} <= files
    assert any(name.endswith(".safetensors") for name in files)


def test_version_has_one_source(wheel):
    assert Path(wheel.filename).name.startswith(f"fastflowgrpo-{fastflowgrpo.__version__}-cp")


def test_without_a_compiler_the_wheel_is_built_without_the_extension_even_of_an_earlier_build(checkout, wheel):
    earlier = checkout / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / EXTENSION
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    without = build_wheel(checkout, checkout.parent / "without", CXX="/no/compiler")
    assert package_files(without.namelist()) == package_files(wheel.namelist()) - {EXTENSION}
    assert any(earlier.parent.iterdir()) and not earlier.exists()


def test_unpacked_wheel_works(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = "import fastflowgrpo.kernels.sde_step as module; print(module.__file__)"
    path = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).strip()
    assert Path(path) == tmp_path / "site/fastflowgrpo/kernels/sde_step.py"
    code = "from fastflowgrpo import _native; print(_native.__file__)"
    path = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).strip()
    assert Path(path) == tmp_path / "site" / EXTENSION
    help_text = run("-m", "fastflowgrpo.train", "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "Run directory: config, metrics, images, checkpoints." in help_text


def test_constraints_pin_what_the_tested_extras_need(wheel):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {match[1].lower() for line in lines if (match := re.fullmatch(r"([\w.-]+)==[\w.]+", line))}
    assert len(pins) == len(lines) - 1  # the first line is a comment
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    requirements = message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist")
    tested = [text for text in requirements if not re.search(r'extra == "(?!test|ocr|plot|demo|bench|docs)', text)]
    assert len(tested) > 15
    for requirement in tested:
        assert re.match(r"[\w.-]+", requirement)[0].lower() in pins
