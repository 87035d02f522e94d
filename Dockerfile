# Training on NVIDIA GPUs. This file passes hadolint, but the image has not been built, nor run on a GPU.
#
#   docker build -t fastflowgrpo .
#   docker run --gpus all --ipc host -v "$PWD/runs:/workspace/runs" -v "$HOME/.cache/huggingface:/cache" \
#     fastflowgrpo python -m fastflowgrpo.train --config configs/sd35_ocr.yaml
#
# PyPI's torch for Linux brings the CUDA libraries and Triton; the host needs the driver and NVIDIA's container toolkit.
FROM python:3.11-slim-bookworm

# For the C++ extension, and for Triton and torch.compile, which compile their launchers at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace
COPY . .
# Editable, because the recipes in configs/ are not part of the package.
RUN pip install --no-cache-dir -c constraints.txt -e ".[ocr,serve,plot]"

ENV HF_HOME=/cache
CMD ["python", "-m", "fastflowgrpo.train", "--help"]
