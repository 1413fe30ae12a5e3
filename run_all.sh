#!/usr/bin/env bash
# bash run_all.sh [DATA_DIR] [OUTPUT_DIR]
# Sets up, makes the data if there is none, then trains, evaluates and draws. Run again to continue where it stopped.
# PROFILE=quick (default): small nets, a few epochs, one seed. PROFILE=full: the recipes of README's tables.
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
quick) # few steps: small nets and batches; batch statistics of each domain adapt sooner than the mixture's
    faces=(--width 32 --batch-size 32 --lr 5e-4 --ema-decay 0.99 --augment translation)
    dcgan=("${faces[@]}" --epochs 8)
    wgangp=("${faces[@]}" --epochs 5 --n-critic 1 --drift 0.001)
    table=(--nets deep --seeds 0 --epochs 6 --images-per-epoch 6400 --forward separate --lambda-max 0.5) ;;
full)
    dcgan=(--augment translation)
    wgangp=(--augment translation --n-critic 1 --lr 2e-4 --drift 0.001)
    table=(--nets deep cnn --seeds 0 1 2) ;;
*) echo "error: PROFILE=$PROFILE: quick or full" >&2 && exit 2 ;;
esac

if [ ! -d "$data_dir/digits" ] || { [ ! -d "$data_dir/clip_zeroshot" ] &&
    grep -qs '"synthetic"' "$data_dir"/digits/*/made.json; }; then # none, or half made
    run prepare_data.py synthetic --data-dir "$data_dir"
fi
if [ ! -d "$output_dir" ]; then
    run prepare_data.py check "$data_dir"
fi

p1=$output_dir/p1
if [ -d "$data_dir/face/train" ]; then
    run p1_dcgan.py train --data-dir "$data_dir" --output-dir "$p1/dcgan" "${dcgan[@]}"
    run p1_wgangp.py train --data-dir "$data_dir" --output-dir "$p1/wgangp" "${wgangp[@]}"
    for method in dcgan wgangp; do
        if [ ! -f "$p1/score/$method-random/result.json" ]; then # the last of a method's files
            run "p1_$method.py" sample --checkpoint "$p1/$method/model.safetensors" --output-dir "$p1/faces/$method" \
                --grid "$p1/first32_$method.png"
            run score.py faces "$p1/faces/$method" --real "$data_dir/face/val" --output-dir "$p1/score/$method-faces"
            run score.py fid "$p1/faces/$method" "$data_dir/face/val" --floor "$data_dir/face/train" \
                --features random --output-dir "$p1/score/$method-random"
        fi
    done
    echo "Faces: $p1/first32_{dcgan,wgangp}.png, scores: $p1/score"
fi

p3=$output_dir/p3
run p3_dann.py table --data-dir "$data_dir" --output-dir "$p3" "${table[@]}"
for target in svhn usps; do
    run p3_dann.py embed --data-dir "$data_dir" --checkpoint "$p3/$target-deep-dann-seed0/model.safetensors" \
        --output-dir "$p3/figures/$target"
done
echo "Adaptation: $p3/table.png; t-SNE: $p3/figures/{svhn,usps}/tsne_{class,domain}.png"

if [ -d "$data_dir/clip_zeroshot/train" ]; then
    run p3_clip_zeroshot.py pretrain --data-dir "$data_dir" --output-dir "$p3/clip-small"
    if [ ! -f "$p3/clip/result.json" ]; then
        run p3_clip_zeroshot.py --data-dir "$data_dir" --checkpoint "$p3/clip-small/model.safetensors" \
            --output-dir "$p3/clip"
    fi
    echo "Zero-shot classification: $p3/clip/{table,cases,similarity,confusion}.png"
elif [ -d "$data_dir/clip_zeroshot/val" ]; then # the course's
    run p3_clip_zeroshot.py --data-dir "$data_dir" --output-dir "$p3/clip" || echo "Zero-shot classification: left out"
fi
echo "Done."
