#!/bin/bash
# Two nodes of 8 GPUs under SLURM: sbatch examples/slurm.sh [CONFIG] [--key=value ...]
# The same job again, or the requeued one, continues its run. docs/cluster.md explains the rest.
#SBATCH --job-name=miaobi
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
    set -- configs/chat-300m.yaml --batch_size=48
fi
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 # seconds that torchrun gives its workers for the last checkpoint
# export NCCL_SOCKET_IFNAME=ib0 NCCL_DEBUG=INFO  # where NCCL takes the wrong interface

# Pre-emption sends SIGTERM to torchrun and its workers by itself. Three minutes before the time limit this script gets
# SIGUSR1, does the same, and queues the job again.
expiring=
trap 'expiring=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=0 torchrun \
    --nnodes="1:$SLURM_NNODES" \
    --nproc_per_node=gpu \
    --rdzv-backend=c10d \
    --rdzv-endpoint="${nodes[0]}:29500" \
    --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=3 \
    -m miaobi train "$@" &
steps=$!

status=0
while kill -0 "$steps" 2>/dev/null; do # a trapped signal ends `wait` early
    wait "$steps" && status=0 || status=$?
done
if [ -n "$expiring" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
