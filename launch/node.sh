#!/usr/bin/env bash
# Train on several hosts: the same line on each of them, in any order.
#   MASTER_ADDR=host1 NNODES=2 launch/node.sh train CONFIG.yaml [--key.sub value ...]
# host1 is one of them, and the run folder lies where all see it. Ranks of a host: as many as it has GPUs (or cores), or
# NPROC=N. After a crash, or a link that breaks, they meet again and go on from the newest checkpoint: MAX_RESTARTS (10)
# times at most without a new one, after pauses that grow from 2 s to a minute. MASTER_PORT: 29500 unless set.
set -uo pipefail
if [ $# -lt 2 ] || [ -z "${MASTER_ADDR:-}" ] || [ -z "${NNODES:-}" ]; then
  echo "usage: MASTER_ADDR=HOST NNODES=N $0 train CONFIG.yaml [--key.sub value ...]" >&2; exit 2
fi
# Also says in one line what is wrong with the config, before ranks start.
figures=$(dist-trainer plan "${@:2}" ${NPROC:+--at_most "$NPROC"} --show run,world,stop_seconds) || exit
{ read -r run; read -r NPROC; read -r stop; } <<< "$figures"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$stop}  # until torchrun kills ranks that save

told=''
trap 'told=1; kill -TERM "$pid" 2>/dev/null' TERM HUP USR1  # torchrun tells its ranks; of SIGUSR1 it would die
trap 'told=1' INT                                           # Ctrl-C reaches them by itself
restarts=0 pause=2
while :; do
  newest=$(ls "$run/checkpoints" 2>/dev/null | tail -n 1)
  # torchrun, but it ends as its ranks do, and it derives threads, addresses and interfaces.
  dist-trainer agent --nnodes "$NNODES" --nproc-per-node "$NPROC" --rdzv-backend c10d --rdzv-id "${run##*/}" \
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" -m dist_trainer "$@" &
  pid=$!
  while :; do  # wait returns early when a trap runs
    wait "$pid"; status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  case $status in 0 | 2 | 3 | 130) exit "$status" ;; esac  # done, a mistake, stopped, stopped at once: on all hosts
  if [ -n "$told" ]; then exit "$status"; fi
  if [ "$(ls "$run/checkpoints" 2>/dev/null | tail -n 1)" != "$newest" ]; then restarts=0 pause=2; fi
  if [ $((restarts += 1)) -gt "${MAX_RESTARTS:-10}" ]; then
    echo "$run: no new checkpoint in $((restarts - 1)) restarts: ended" >&2; exit "$status"
  fi
  echo "$run: restart $restarts of ${MAX_RESTARTS:-10} since ${newest:-the start}, in $pause s" >&2
  sleep "$pause" &
  wait $!
  if [ -n "$told" ]; then exit "$status"; fi
  pause=$((pause * 2 < 60 ? pause * 2 : 60))
done
