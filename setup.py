"""Package metadata. Tool settings are in pyproject.toml, the tested versions in constraints.txt."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
# Read, not imported: building needs none of the dependencies.
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "fastflowgrpo/__init__.py").read_text(), re.MULTILINE)


class CMakeBuild(build_ext):
    """Builds csrc/ with CMake and Ninja. An optional extension that fails to build is left out, with a warning."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.unlink(missing_ok=True)  # if this build fails, an earlier one's must not be packaged
        # Beside the interpreter too: without build isolation its folder need not be on PATH.
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        try:
            import pybind11

            tools = {tool: shutil.which(tool, path=path) or "" for tool in ("cmake", "ninja")}
            if missing := [tool for tool, found in tools.items() if not found]:
                raise FileNotFoundError(f"not on PATH: {', '.join(missing)}")
            build = Path(self.build_temp).resolve() / ext.name
            configure = {
                "CMAKE_MAKE_PROGRAM": tools["ninja"],
                "CMAKE_LIBRARY_OUTPUT_DIRECTORY": library.parent,
                "Python_EXECUTABLE": sys.executable,
                "pybind11_DIR": pybind11.get_cmake_dir(),
            }
            defines = [f"-D{name}={value}" for name, value in configure.items()]
            # Fresh: the cache of a checkout that has since moved, or of another environment, is none.
            command = [tools["cmake"], "--fresh", "-S", ROOT / "csrc", "-B", build, "-G", "Ninja", *defines]
            subprocess.run(command, check=True)
            subprocess.run([tools["cmake"], "--build", build], check=True)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{error}; without it group advantages are computed with torch") from error


BUILD = ["cmake>=3.24", "ninja", "pybind11>=3"]  # as in pyproject.toml; the tests build a wheel without isolation
TRITON = ["triton>=3.6; sys_platform == 'linux'"]
OCR = ["rapidocr>=3.10", "onnxruntime>=1.20", "rapidfuzz>=3"]
DATASETS = ["pyarrow>=21"]
PADDLE = ["paddleocr>=3", "paddlepaddle>=3", "rapidfuzz>=3"]
DEMO = ["gradio>=6.31"]
EDIT = ["torchvision"]  # each version needs one of torch
TEST = [
    "pytest>=9",
    "pytest-xdist>=3.8",
    "hypothesis>=6.100",
    "schemathesis>=4",
    "ruff",
    "mypy>=2",
    "import-linter>=2.17",
    "selenium>=4.30",
]
SERVE = [
    "fastapi>=0.115",
    "httptools>=0.6",  # uvicorn's fast parser
    "python-multipart>=0.0.18",
    "prometheus_client>=0.20",
    "anyio>=4",
]

setup(
    name="fastflowgrpo",
    version=VERSION,
    description="Fast online reinforcement learning (Flow-GRPO) of flow-matching image models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0 AND MIT",  # MIT: uPlot
    license_files=["LICENSE", "fastflowgrpo/viewing/pages/vendor/LICENSE"],
    keywords=["diffusion", "flow matching", "reinforcement learning", "GRPO", "text-to-image", "Triton"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # Namespace packages, because kernels/ has no __init__.py: it is reached through the symlink fastflowgrpo/kernels.
    packages=find_namespace_packages(
        include=["fastflowgrpo*"], exclude=["*.__pycache__", "fastflowgrpo.shapes.*", "fastflowgrpo.viewing.*"]
    ),
    ext_modules=[
        Extension("fastflowgrpo._native", ["csrc/group_advantages.cpp"], depends=["csrc/CMakeLists.txt"], optional=True)
    ],
    cmdclass={"build_ext": CMakeBuild},
    package_data={
        "fastflowgrpo": ["py.typed"],
        "fastflowgrpo.shapes": ["pipeline/**/*", "edit_pipeline/**/*"],
        "fastflowgrpo.viewing": ["pages/**/*"],
    },
    install_requires=[
        "torch>=2.11",
        "diffusers>=0.42",
        "transformers>=5.23",
        "peft>=0.18",
        "accelerate>=1.10",
        "safetensors>=0.8",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10",
        "tqdm>=4.66",
        "psutil>=6",
        "urllib3>=2.5",
        "jsonargparse[signatures]>=4.53",
        "pyyaml>=6",
        "starlette>=0.40",
        "uvicorn>=0.30",
        "tensorboard>=2.17",
    ],
    extras_require={
        "test": [*TEST, *BUILD, *TRITON, *OCR, *SERVE, *DEMO, *DATASETS],
        "bench": ["pytest-benchmark>=5", "matplotlib>=3.8"],
        "gpu": [*TRITON, "xformers; sys_platform == 'linux'"],
        "ocr": OCR,
        "paddle": PADDLE,
        "quantized": ["torchao>=0.18", "bitsandbytes>=0.50; sys_platform == 'linux'"],
        "datasets": DATASETS,
        "track": ["wandb>=0.20"],
        "serve": SERVE,
        "plot": ["matplotlib>=3.8"],
        "demo": DEMO,
        "edit": EDIT,
        "view": [],  # whose libraries are always installed
        "docs": ["mkdocs-material>=9.8", "mkdocstrings[python]>=1"],
    },
)
