#!/bin/bash
# Training on one or more nodes of a Slurm cluster, one process a node:
#   sbatch launch/slurm.sh
#   sbatch --nodes=1 --gpus-per-node=1 launch/slurm.sh train.batch_size=64
# Edit the lines below. The job is queued again before its time limit, after the loss of a node or process, and after
# preemption, and each time goes on from its newest checkpoint. It is final when the run is complete, or its status is
# neither 75 nor that of a signal. `scancel` ends it for good.
#SBATCH --job-name=flowdit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# One settings list for every start. Data and run folder must be on a file system that all nodes share.
RUN=(
  flowdit train-stage1 experiment=imagenet256_xl2
  data.path=/shared/data/imagenet256
  train.checkpoint_dir=/shared/runs/imagenet256_xl2
  train.batch_size=256
  mesh.fsdp=8
)
MAX_RESTARTS=${MAX_RESTARTS:-100}
# source /shared/venv/bin/activate

export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jax} # restarts compile nothing
# Overlap of communication and compute; found from the repository's folder, where the job was submitted.
# shellcheck source=/dev/null
. "${SLURM_SUBMIT_DIR:-.}/scripts/xla_flags.sh" gpu
devices=()
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
  devices=("mesh.devices_per_process=$((SLURM_GPUS_ON_NODE / ${SLURM_NTASKS_PER_NODE:-1}))")
fi

# Each process ends by itself when another one is lost, so Slurm need not kill it, and the status stays 75. In Slurm
# 22.05 and 23.02 srun does not take --cpus-per-task from the job.
srun --kill-on-bad-exit=0 --wait=120 --label --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  "${RUN[@]}" train.is_restore=null train.requeue=true "${devices[@]}" "$@"
status=$?

restarts=${SLURM_RESTART_COUNT:-0}
if ((status == 75 || status >= 128)) && ((restarts < MAX_RESTARTS)); then
  echo "status $status, queued again: restart $((restarts + 1)) of at most $MAX_RESTARTS"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
