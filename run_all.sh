#!/usr/bin/env bash
# bash run_all.sh [DATA_DIR] [OUTPUT_DIR]: set up, make the data if there is none, train, evaluate, draw. Run again to continue.
set -euo pipefail
data_dir=$(realpath -m "${1:-hw2_data}")
output_dir=$(realpath -m "${2:-output}")
cd "$(dirname "$0")"
source setup.sh

step() {
    echo "+ python $*"
    python "$@"
}

if [ ! -d "$data_dir/digits" ]; then
    step prepare_data.py synthetic --data-dir "$data_dir"
fi
step prepare_data.py check "$data_dir"
