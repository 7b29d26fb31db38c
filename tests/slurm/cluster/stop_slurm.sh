#!/bin/bash
# stop_slurm.sh DIR: cancel what runs, then stop by pid what start_slurm.sh started in DIR.
DIR=$(cd "${1:?usage: stop_slurm.sh DIR}" 2>/dev/null && pwd -P) || exit 0
export SLURM_CONF=$DIR/slurm.conf
timeout 5 scancel --state=PENDING --user=root >/dev/null 2>&1; timeout 5 scancel --user=root >/dev/null 2>&1
for _ in $(seq 100); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
gone() { [ ! -d "/proc/$1" ] || grep -q "^State:.*Z" "/proc/$1/status" 2>/dev/null; }  # a zombie waits for PID 1 only
stop() {
  [ -s "$1" ] || return
  p=$(cat "$1")
  [ "$(cat "/proc/$p/comm" 2>/dev/null)" = "$2" ] || return
  kill "$p" 2>/dev/null
  for _ in $(seq 100); do gone "$p" && return; sleep 0.1; done
  kill -9 "$p"
}
for f in "$DIR"/slurmd.*.pid; do stop "$f" slurmd; done
stop "$DIR/slurmctld.pid" slurmctld
stop "$DIR/slurmdbd.pid" slurmdbd
stop "$DIR/db/pid" mariadbd
stop "$DIR/munge/pid" munged
exit 0
