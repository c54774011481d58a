#!/bin/bash
# Four nodes with eight GPUs each, as one run: sbatch examples/slurm.sh
#SBATCH --job-name=mulki
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
set -euo pipefail

# One torchrun a node; they meet at the first one. The job's number keeps two jobs apart.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))

# srun does not take the number of CPUs over from sbatch.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m mulki -- run --tasks birds/ textures/ --model ViT-B-16-quickgelu --pretrained openai \
    --batch-size 64 --workers 6 --logs logs --name "run-$SLURM_JOB_ID"
