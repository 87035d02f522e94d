"""Imports point one way: the contract in pyproject.toml, and the kernels, which its tool cannot see."""

import ast
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def test_a_room_imports_only_from_the_rooms_below_it():
    command = [Path(sysconfig.get_path("scripts"), "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 1 kept, 0 broken." in done.stdout


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_a_kernel_imports_only_kernels(path):
    """Of this package; kernels/ has no `__init__.py`, so import-linter leaves it out."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            imported |= {f"{node.module}.{name.name}" for name in node.names}
    ours = {name for name in imported if name.split(".")[0] in ("fastflowgrpo", "kernels")}
    assert [name for name in ours if not name.startswith("fastflowgrpo.kernels.")] == []
