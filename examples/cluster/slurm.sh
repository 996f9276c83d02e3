#!/bin/bash
#SBATCH --job-name=seedbed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#
# sbatch examples/cluster/slurm.sh pretrain --config gpt2 --data /shared/book.txt --output /shared/runs/book
#
# One torchrun on each node starts a process for each GPU; they find each other at the first node. Two minutes before the
# time is over all are told, save and leave; the same sbatch goes on. --output is on a disk that all nodes see.
set -euo pipefail

nodes=${SLURM_NNODES:-1}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

exec srun torchrun \
  --nnodes "$nodes" \
  --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$first:${RDZV_PORT:-29400}" \
  --max-restarts "${MAX_RESTARTS:-3}" \
  -m seedbed "$@"
