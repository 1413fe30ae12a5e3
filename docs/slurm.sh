#!/bin/bash
# Train on two nodes with four GPUs each: sbatch docs/slurm.sh, from the clone, in a folder that all
# nodes see. The same job again continues the training.
#SBATCH --job-name=digits
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.txt
set -euo pipefail

source .venv/bin/activate
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun on each node; they find each other at the first one.
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc_per_node 4 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_node:29500" \
    p2_ddpm_train.py --data-dir hw2_data --domains mnistm svhn --output-dir runs/p2/digits
