#!/usr/bin/env bash
# The one gate, by hand and in CI: lint, types, tests. Makes .venv and installs what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/environment.sh
install_minimoe dev

echo "== lint"
ruff format --check .
ruff check .
echo "== types"
mypy
echo "== tests"
# A process for each core and one thread in each: half the time of one process with all the threads.
OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist loadfile "$@"
