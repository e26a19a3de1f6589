#!/usr/bin/env bash
# What a GPU computes and how fast, in at most 8 minutes: bash scripts/gpu_check.sh [OUT] [--device cpu]
# Needs Python with torch and minimoe's other core packages; no network. Results are written to OUT as they come.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$root/.venv/bin/python" ] && . "$root/.venv/bin/activate"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m scripts.gpu_check "$@"
