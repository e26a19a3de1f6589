# Sourced by the other scripts: a virtual environment in .venv with minimoe in it.

install_minimoe() { # install_minimoe [EXTRA]: make .venv and install this checkout, once per pyproject.toml
  local extra=${1:+[$1]} python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "minimoe needs Python 3.10 or newer; $("$python" --version) found. Set PYTHON=/path/to/python3" >&2
    exit 2
  }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  . .venv/bin/activate
  local mark=.venv/installed-${1:-base}
  if [ ! -e "$mark" ] || [ pyproject.toml -nt "$mark" ]; then
    printf '== install: minimoe%s into .venv (a few minutes, mostly PyTorch)\n' "$extra"
    local started=$SECONDS
    python -m pip install --quiet --editable ".$extra"
    touch "$mark"
    printf '== install took %d s\n' $((SECONDS - started))
  fi
}
