#!/bin/bash
# Runs a command, and again as long as it ends with status 75 (another process was lost, or a watchdog or a signal has
# stopped it) or is killed by a signal. Any other status is final: 0 complete, 2 a mistake in the settings, 1 an error.
#
#   launch/again.sh flowdit train-stage1 data.path=data/mine train.is_restore=null train.requeue=true
#
# SIGTERM and Ctrl-C go to the command, or to the process whose number it writes to the file $PID_FILE; it is then not
# started again.
MAX_RESTARTS=${MAX_RESTARTS:-100}
PAUSE=${PAUSE:-5} # seconds, in which the other processes end as well

stop() {
  stopped=1
  if [[ -n $child ]]; then
    kill -TERM "$(cat "${PID_FILE:-/dev/null}")" 2>/dev/null || kill -TERM "$child"
  fi
}
forget() { [[ -z ${PID_FILE:-} ]] || rm -f "$PID_FILE"; }

stopped=""
child="" # while it is running
trap stop TERM INT
trap forget EXIT
for ((restart = 0; ; restart++)); do
  "$@" &
  child=$!
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do # the signal has ended `wait`, not the command
    wait "$child"
    status=$?
  done
  child=""
  forget
  case $status in
    75 | 9 | 15 | 129 | 1[3-9]? | 2??) ;; # MPICH's mpirun ends with the signal's number itself
    *) exit "$status" ;;
  esac
  if [[ -n $stopped ]] || ((restart == MAX_RESTARTS)); then
    exit "$status"
  fi
  echo "again.sh: status $status, restart $((restart + 1)) of at most $MAX_RESTARTS" >&2
  sleep "$PAUSE"
  if [[ -n $stopped ]]; then
    exit "$status"
  fi
done
