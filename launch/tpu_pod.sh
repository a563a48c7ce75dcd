#!/bin/bash
# Training on a Cloud TPU slice that is queued for, from a machine with gcloud and this repository:
#   launch/tpu_pod.sh          # create the slice, train, create it again after preemption, until the run is complete
#   launch/tpu_pod.sh log      # the log of the first host
#   launch/tpu_pod.sh stop     # stop the run with a save
#   launch/tpu_pod.sh delete   # delete the slice
# Edit the lines below. Interrupting this script stops nothing: the hosts go on by themselves, and the script may be
# started again at any time. On each host the run is the systemd unit `flowdit`, which starts it again after status 75
# and after a kill; other errors are final.
set -eu
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
state() { tpus queued-resources describe "$NAME" --format="value(state.state)" 2>/dev/null || echo NONE; }
unit() { # its state and exit status on the first host
  local show="systemctl show flowdit --value --property"
  on_hosts 0 "echo \$($show=ActiveState) \$($show=ExecMainStatus)" || echo unreachable
}

create() {
  # shellcheck disable=SC2086
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
    $CAPACITY
}
delete() { tpus queued-resources delete "$NAME" --force --quiet; }

start() { # has no effect where the unit is running
  local command
  command=$(printf '%q ' "${RUN[@]}" train.is_restore=null train.requeue=true)
  on_hosts all "mkdir -p flowdit-source && python3 -m venv venv && sudo systemctl reset-failed flowdit || true" &&
    tpus tpu-vm scp --recurse --worker=all flowdit pyproject.toml README.md LICENSE "$NAME:flowdit-source/" &&
    on_hosts all "venv/bin/pip install --quiet './flowdit-source[tpu,gcs]'" &&
    on_hosts all "systemctl is-active --quiet flowdit || sudo systemd-run --unit=flowdit --uid=\$(id -u) \
--working-directory=\$HOME --setenv=PATH=\$HOME/venv/bin:\$PATH --setenv=HOME=\$HOME \
--setenv=JAX_COMPILATION_CACHE_DIR=\$HOME/jax-cache --property=Restart=on-failure --property=RestartSec=10 \
--property='RestartPreventExitStatus=1 2' --property=StartLimitIntervalSec=0 --property=TimeoutStopSec=600 $command"
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
          delete
          ;;
        ACTIVE)
          if [[ -z $started ]]; then
            if start; then started=1; fi
          else
            read -r active status < <(unit)
            if [[ $active == inactive || $active == failed ]]; then
              echo "the run has ended with status $status; launch/tpu_pod.sh delete removes the slice"
              exit "$status"
            fi
          fi
          ;;
      esac
      sleep "$POLL"
    done
    ;;
  *) echo "usage: launch/tpu_pod.sh [run|log|stop|delete]" >&2 && exit 2 ;;
esac
