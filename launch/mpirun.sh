#!/bin/bash
# Several processes on one machine by mpirun of Open MPI or MPICH, each with its own devices:
#   launch/mpirun.sh
#   PROCESSES=8 DEVICES_PER_PROCESS=1 launch/mpirun.sh train.batch_size=64
# Edit the lines below. After the loss of a process all are started again and go on from the newest checkpoint. To stop
# them with a save, send SIGTERM to this script: mpirun itself would kill them within a second.
set -eu
PROCESSES=${PROCESSES:-2}
DEVICES_PER_PROCESS=${DEVICES_PER_PROCESS:-4}
PORT=${PORT:-12321} # any free one
MPIRUN=${MPIRUN:-mpirun}
RUN=(
  flowdit train-stage1
  data.path=data/mine
  train.checkpoint_dir=checkpoints
)

export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jax} # restarts compile nothing
# shellcheck source=/dev/null
. "$(dirname "$0")/../scripts/xla_flags.sh" gpu # overlap of communication and compute
PID_FILE=${PID_FILE:-$(mktemp)}
export PID_FILE
# The first process leaves its number for again.sh. A signal to one of them stops all at the same step.
# shellcheck disable=SC2016
leave_number='[[ ${OMPI_COMM_WORLD_RANK:-$PMI_RANK} != 0 ]] || echo $$ >"$PID_FILE"; exec "$@"'
exec "$(dirname "$0")/again.sh" "$MPIRUN" --bind-to none -np "$PROCESSES" bash -c "$leave_number" - \
  "${RUN[@]}" "mesh.coordinator=localhost:$PORT" "mesh.devices_per_process=$DEVICES_PER_PROCESS" \
  train.is_restore=null train.requeue=true "$@"
