#!/bin/bash
# Training on a Cloud TPU slice that is queued for, from a machine with gcloud and this repository:
#   launch/tpu_pod.sh          # create the slice, train, create it again after preemption, until the run is complete
#   launch/tpu_pod.sh log      # the log of the first host
#   launch/tpu_pod.sh stop     # stop the run with a save
#   launch/tpu_pod.sh delete   # delete the slice
# Edit the lines below. Interrupting this script stops nothing: the hosts go on by themselves, and the script may be
# started again at any time. On each host the run is the systemd unit `flowdit`, which starts it again after status 75
# and after a kill; other errors are final. After the reboot of a host this script starts all again.
set -eu
cd "$(dirname "$0")/.."
NAME=${NAME:-flowdit}
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
CAPACITY=${CAPACITY---spot} # or --reserved, or empty
POLL=${POLL:-60}            # seconds
# Data and run folder: object storage that the service account of the slice may write, or a file system that all mount.
RUN=(
  flowdit train-stage1 experiment=imagenet256_xl2
  data.path=gs://my-bucket/data/imagenet256
  train.checkpoint_dir=gs://my-bucket/runs/imagenet256_xl2
  train.batch_size=256
  mesh.fsdp=16
  model.remat=dots
)

tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
on_hosts() { tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }
state() { # of the slice; NONE if there is none, nothing if gcloud cannot tell
  local problem
  {
    problem=$(tpus queued-resources describe "$NAME" --format="value(state.state)" 2>&1 >&3) || case $problem in
      *NOT_FOUND*) echo NONE ;;
      *) echo "$problem" >&2 ;;
    esac
  } 3>&1
}
create() {
  # shellcheck disable=SC2086
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
    $CAPACITY || echo "no slice was created; again in $POLL s" >&2
}
delete() { tpus queued-resources delete "$NAME" --force --quiet; }

units() { # on each host "unit", its state and the exit status; it is dead before the first start and after a reboot
  local show="systemctl show flowdit --value --property"
  on_hosts all "echo unit \$($show=SubState) \$($show=ExecMainStatus)"
}
start() { # on all hosts; those that are running are stopped with a save, so that all have the same files
  local command flags kind=${TYPE%%-*} uv=.local/bin/uv # which brings Python 3.12; the hosts may have an older one
  flags=$(scripts/xla_flags.sh "${kind/litepod/e}") || flags="" # of another kind of slice
  command=$(printf '%q ' "${RUN[@]}" train.is_restore=null train.requeue=true)
  on_hosts all "{ sudo systemctl stop flowdit; sudo systemctl reset-failed flowdit; } 2>/dev/null; \
rm -rf flowdit-source; mkdir flowdit-source && curl -LsSf https://astral.sh/uv/install.sh | sh && \
$uv venv --quiet --allow-existing --python 3.12 venv" &&
    tpus tpu-vm scp --recurse --worker=all flowdit pyproject.toml README.md LICENSE "$NAME:flowdit-source/" &&
    on_hosts all "$uv pip install --quiet --reinstall-package flowdit --python venv/bin/python \
'./flowdit-source[tpu,gcs]'" &&
    on_hosts all "sudo systemd-run --unit=flowdit --remain-after-exit --uid=\$(id -u) --working-directory=\$HOME \
--setenv=PATH=\$HOME/venv/bin:\$PATH --setenv=HOME=\$HOME --setenv=JAX_COMPILATION_CACHE_DIR=\$HOME/jax-cache \
--setenv=LIBTPU_INIT_ARGS='$flags' \
--property=Restart=on-failure --property=RestartSec=10 --property='RestartPreventExitStatus=1 2' \
--property=StartLimitIntervalSec=0 --property=TimeoutStopSec=600 \$HOME/venv/bin/$command"
}
watch() { # start the units where it is needed; exit when they have ended
  local answer
  answer=$(units) || return 0 # unreachable: again at the next poll
  if [[ $answer == *"unit dead"* || ($answer == *"unit failed"* && -z $started) ]]; then
    if start; then started=1; fi
    return
  fi
  started=1
  if [[ $answer =~ unit\ failed\ ([0-9]+) ]]; then
    echo "the run has ended with status ${BASH_REMATCH[1]}; launch/tpu_pod.sh delete removes the slice"
    exit "${BASH_REMATCH[1]}"
  elif [[ $answer == *"unit exited"* && ${answer//unit exited/} != *unit* ]]; then
    echo "the run is complete; launch/tpu_pod.sh delete removes the slice"
    exit 0
  fi
}

case ${1:-run} in
  log) on_hosts 0 "journalctl --unit=flowdit --output=cat --follow --lines=100" ;;
  stop) on_hosts all "sudo systemctl stop flowdit" ;;
  delete) delete ;;
  run)
    started=""
    while true; do
      case $(state) in
        NONE)
          started=""
          create
          ;;
        SUSPENDED | FAILED) # preempted: a slice cannot be used again
          started=""
          delete || echo "the slice was not deleted; again in $POLL s" >&2
          ;;
        ACTIVE) watch ;;
      esac
      sleep "$POLL"
    done
    ;;
  *) echo "usage: launch/tpu_pod.sh [run|log|stop|delete]" >&2 && exit 2 ;;
esac
