#!/usr/bin/env bash
# The long proof that a run survives: bash scripts/chaos.sh [KILLS]
# Kills real training runs at random moments, at every failpoint of saving and by full disks, feeds them malformed
# input, and puts the same accidents to transformers.Trainer and accelerate. About 15 minutes on 2 cores for 100 kills.
# Writes runs/chaos/*.json and docs/results/chaos.md; exits with 1 when anything was not as promised.
# Another SEED=1 gives other moments and other malformed input.
set -euo pipefail
cd "$(dirname "$0")/.."

KILLS=${1:-100}
SEED=${SEED:-0}
OUT=runs/chaos
mkdir -p "$OUT"
rm -f "$OUT"/*.json
failed=()

stage() { # stage NAME COMMAND...: run the command, say how long it took and remember if it failed
  local name=$1 started=$SECONDS
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  "$@" || failed+=("$name")
  printf '== %s took %d s\n' "$name" $((SECONDS - started))
}

. scripts/environment.sh
install_minimoe dev

stage kills python tests/chaos.py --kills "$KILLS" --seed "$SEED" --json "$OUT/kills.json"
stage malformed python tests/malformed.py --count 200 --seed "$SEED" --json "$OUT/malformed.json"
# A killed Trainer leaves the semaphore of its progress bar to Python's tracker, which would warn of it.
stage peers python -W ignore:resource_tracker scripts/chaos_peers.py --seed "$SEED" --json "$OUT/peers.json"
stage report python scripts/chaos_report.py "$OUT" docs/results/chaos.md

[ ${#failed[@]} -eq 0 ] || {
  echo "not as promised: ${failed[*]}" >&2
  exit 1
}
