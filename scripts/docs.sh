#!/usr/bin/env bash
# The docs as a site, with its reference made from the code: docs/_build/html/index.html
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install_minimoe docs
python -m scripts.docs
python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html
echo "docs/_build/html/index.html"
