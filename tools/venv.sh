#!/bin/sh
# Make the virtual environment (default .venv) if it is not there or is broken; do nothing otherwise.
# Finds a Python >= 3.11. Where Debian's venv module is missing it is installed, as root; otherwise the remedy is named.
set -eu
folder=${1:-.venv}

if "$folder/bin/python" -m pip --version >/dev/null 2>&1; then exit 0; fi

python_of() {
    for name in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$name" -c "import sys$1; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
}

python=$(python_of ", venv, ensurepip")
if [ -z "$python" ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "tools/venv.sh: installing python3 and python3-venv with apt-get" >&2
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv >&2
    python=$(python_of ", venv, ensurepip")
fi
if [ -z "$python" ]; then
    echo "tools/venv.sh: no Python >= 3.11 with its venv module is on PATH (tried python3.11, python3.12, python3.13," \
         "python3; found without venv: $(python_of "" | grep . || echo none)). Do: sudo apt-get install python3-venv," \
         "or name one: make PYTHON=/path/to/python3 ..." >&2
    exit 1
fi
"$python" -m venv --clear "$folder"
