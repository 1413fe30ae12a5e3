# shellcheck shell=bash
# What the graders' scripts share; each of them sources it. Paths are relative to the current directory.
# CHECKPOINTS=FOLDER takes the weights from another folder than checkpoints/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python # from setup.sh; a grader may have an environment of their own
[ -x "$python" ] || python=python3

fail() { # STATUS LINE
    echo "$2" >&2
    exit "$1"
}

# expect "NAME NAME …" "$@": one argument for each name, none of them empty.
expect() {
    local names=$1 argument given=0
    shift
    for argument; do [ -z "$argument" ] || given=$((given + 1)); done
    if [ "$given" != $# ] || [ $# != "$(wc -w <<<"$names" | tr -d ' ')" ]; then fail 2 "usage: bash $0 $names"; fi
}

# weights NAME COMMAND: sets `checkpoint`. If it is missing, says which run's weights to put there.
weights() {
    checkpoint=${CHECKPOINTS:-$root/checkpoints}/$1.safetensors
    [ -f "$checkpoint" ] || fail 2 "error: $checkpoint: no such file; put model.safetensors of '$2' there"
}

# digits OUT PER_CLASS DOMAIN: digits of the released network, with 12 network calls for an MNIST-M image, 24 for SVHN.
digits() {
    local how=(--steps 9 --guidance 8 --interval 0.1 0.45)
    if [ "$3" = svhn ]; then how=(--steps 18 --guidance 8 --interval 0 0.3); fi
    weights ddpm_digits "p2_ddpm_train.py --domains mnistm svhn"
    "$python" "$root/p2_ddpm_infer.py" --checkpoint "$checkpoint" --output-dir "$1" --per-class "$2" --domains "$3" \
        --sampler dpm-solver++ "${how[@]}" --precision fp32
}

# domain_of PATH: sets `domain` to svhn or usps, whichever PATH names last (in any case), or to DOMAIN.
domain_of() {
    local path svhn usps
    path=$(tr '[:upper:]' '[:lower:]' <<<"$1")
    svhn=${path##*svhn} usps=${path##*usps} # what follows the last mention; everything if there is none
    domain=$(tr '[:upper:]' '[:lower:]' <<<"${DOMAIN:-}")
    if [ ${#svhn} -lt ${#usps} ]; then domain=svhn; elif [ ${#usps} -lt ${#svhn} ]; then domain=usps; fi
    case $domain in
    svhn | usps) ;;
    *) fail 2 "error: $1: the path names neither svhn nor usps; DOMAIN=svhn or DOMAIN=usps before the command does" ;;
    esac
}
