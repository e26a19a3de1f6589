#!/usr/bin/env bash
# The one gate, by hand and in CI: lint, types, tests. Makes .venv and installs what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/environment.sh
install_minimoe dev
export OMP_NUM_THREADS=1 # a process for each core and one thread in each: half the time of one process with all the threads

echo "== lint"
ruff format --check .
ruff check .
echo "== types"
mypy
echo "== tests"
python -m pytest --long --numprocesses auto --dist loadfile "$@" # without --long: the everyday suite
[ $# -eq 0 ] || exit 0

echo "== the model in plain torch"
MINIMOE_OPS=plain python -m pytest --numprocesses auto --durations=0 --durations-min=9 \
  tests/test_model.py tests/test_dispatch.py tests/test_losses.py tests/test_router.py tests/test_engine.py
if command -v "${CXX:-c++}" > /dev/null && [ "$(uname)" = Linux ]; then
  echo "== the C++ under address and undefined-behaviour sanitizers"
  MINIMOE_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1" ASAN_OPTIONS=detect_leaks=0 \
    LD_PRELOAD="$("${CXX:-c++}" -print-file-name=libasan.so) $("${CXX:-c++}" -print-file-name=libubsan.so)" \
    python -m pytest -s -n 0 --durations=0 --durations-min=9 tests/test_c.py tests/test_ops.py -k "test_c.py or c0 or c1"
fi
