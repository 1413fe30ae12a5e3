#!/usr/bin/env bash
# bash run_all.sh [DATA_DIR] [OUTPUT_DIR]
# Sets up, makes the data if there is none, then trains, evaluates and draws. Run again to continue where it stopped.
# PROFILE=quick (default): a few epochs, one seed. PROFILE=full: the recipes of README's tables, both nets, three seeds.
set -euo pipefail
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
data_dir=$(absolute "${1:-hw2_data}")
output_dir=$(absolute "${2:-output}")
cd "$(dirname "$0")"
source ./setup.sh

run() {
    echo "+ python $*"
    python "$@"
}

case "${PROFILE:-quick}" in
quick) # few steps: batch statistics of each domain adapt sooner than the mixture's
    table=(--nets deep --seeds 0 --epochs 6 --images-per-epoch 6400 --forward separate --lambda-max 0.5) ;;
full) table=(--nets deep cnn --seeds 0 1 2) ;;
*) echo "error: PROFILE=$PROFILE: quick or full" >&2 && exit 2 ;;
esac

if [ ! -d "$data_dir/digits" ] ||
    { [ ! -d "$data_dir/face" ] && grep -qs '"synthetic"' "$data_dir"/digits/*/made.json; }; then # none, or half made
    run prepare_data.py synthetic --data-dir "$data_dir"
fi
if [ ! -d "$output_dir/p3" ]; then
    run prepare_data.py check "$data_dir"
fi

run p3_dann.py table --data-dir "$data_dir" --output-dir "$output_dir/p3" "${table[@]}"
for target in svhn usps; do
    run p3_dann.py embed --data-dir "$data_dir" --checkpoint "$output_dir/p3/$target-deep-dann-seed0/model.safetensors" \
        --output-dir "$output_dir/p3/figures/$target"
done
echo "Done. The table: $output_dir/p3/table.png; t-SNE: $output_dir/p3/figures/{svhn,usps}/tsne_{class,domain}.png"
