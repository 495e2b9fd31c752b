#!/usr/bin/env bash
# Train on all devices of this box: launch/local.sh train CONFIG.yaml [--key.sub value ...]
# Ranks: as many as there are GPUs (or cores), and no more than the config can feed. NPROC=N decides it by hand.
# MAX_RESTARTS=N: after the death of a rank, torchrun starts all of them again, from the newest checkpoint.
set -euo pipefail
if [ $# -lt 2 ]; then echo "usage: $0 train CONFIG.yaml [--key.sub value ...]" >&2; exit 2; fi
# Also says in one line what is wrong with the config, before ranks start.
figures=$(dist-trainer plan "${@:2}" --show world,stop_seconds ${NPROC:+--gpus "$NPROC"})
{ read -r NPROC; read -r stop; } <<< "$figures"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$stop}  # until torchrun kills ranks that save
# torchrun, but it ends as its ranks do, and it derives threads and addresses.
dist-trainer agent --standalone --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-0}" -m dist_trainer "$@" &
pid=$!
trap 'kill -TERM "$pid" || :' TERM HUP  # torchrun tells its ranks
trap 'kill -USR1 "$pid" || :' USR1      # so does the agent, that the time is over: W&B goes on with a trial then
trap : INT                              # Ctrl-C reaches them by itself
while :; do  # wait returns early when a trap runs
  wait "$pid" && status=0 || status=$?
  kill -0 "$pid" 2>/dev/null || break
done
exit "$status"
