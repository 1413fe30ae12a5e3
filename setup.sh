# Makes .venv from requirements.txt if it is missing or stale, and puts it first on PATH.
# Sourced by run_all.sh and tests/run.sh from the repository's root; needs Python 3.11 or 3.12 with venv.
is_supported() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }

requirements_hash=$(cksum <requirements.txt)
if [ "$(cat .venv/requirements.hash 2>/dev/null)" != "$requirements_hash" ] || ! .venv/bin/python -c '' 2>/dev/null; then
    for python in "${PYTHON:-}" python3.12 python3.11 python3 python; do
        if [ -n "$python" ] && is_supported "$python"; then break; fi
        python=
    done
    if [ -z "$python" ]; then
        echo "error: Python 3.11 or 3.12 with venv is needed (PYTHON=/path/to/python names one)" >&2
        exit 2
    fi
    echo "Setting up .venv with $("$python" --version) (a few minutes, about 6 GB with the CUDA libraries)"
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    echo "$requirements_hash" >.venv/requirements.hash
fi
export PATH="$PWD/.venv/bin:$PATH"
