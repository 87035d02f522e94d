"""Package metadata. Tool settings are in pyproject.toml, the tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: building needs none of the dependencies.
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "fastflowgrpo/__init__.py").read_text(), re.MULTILINE)

OCR = ["rapidocr>=3.4", "onnxruntime>=1.20", "rapidfuzz>=3"]

setup(
    name="fastflowgrpo",
    version=VERSION,
    description="Fast online reinforcement learning (Flow-GRPO) of flow-matching image models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # Namespace packages, because kernels/ has no __init__.py: it is reached through the symlink fastflowgrpo/kernels.
    packages=find_namespace_packages(include=["fastflowgrpo*"], exclude=["*.__pycache__", "fastflowgrpo.shapes.*"]),
    package_data={"fastflowgrpo.shapes": ["pipeline/**/*"]},
    install_requires=[
        "torch>=2.8",
        "diffusers>=0.36",
        "transformers>=4.57",
        "peft>=0.18",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10",
        "tqdm>=4.66",
        "jsonargparse[signatures]>=4.53",
        "pyyaml>=6",
        "tensorboard>=2.17",
    ],
    extras_require={
        "test": ["pytest>=9", "hypothesis>=6.100", "ruff", "mypy>=2", *OCR],
        "gpu": ["triton>=3.4; sys_platform == 'linux'", "xformers; sys_platform == 'linux'"],
        "ocr": OCR,
        "track": ["wandb>=0.20"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
        "demo": ["matplotlib>=3.8"],
    },
)
