#!/bin/bash
# 24 GPUs under Slurm: one torchrun per node, which starts a process per GPU. From the checkout, in the environment to use:
#   sbatch configs/accelerate/slurm.sh --config configs/sd35_ocr.yaml
#SBATCH --job-name=fastflowgrpo
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -euo pipefail

HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Threads of each process for its own tensors; scorers in processes (workers) come on top.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# Seconds that torchrun gives its processes after a signal, to finish an update and save, before it kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}

# A node that fails takes the others with it: they would wait for it.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$HOST:29500" \
  -m fastflowgrpo.train "$@"
