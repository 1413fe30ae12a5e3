#!/usr/bin/env bash
# bash run_all.sh [DATA_DIR] [OUTPUT_DIR]
# Sets up, makes the data if there is none, then trains, samples, scores and reports. Run again to continue where it
# stopped: steps already done are skipped. New data need a new OUTPUT_DIR.
# PROFILE=quick (default): small nets, few steps, one seed; diffusion goes on from the released weights.
# PROFILE=full: nets of full size, for a GPU.
# PROFILE=smoke: every step once, as short as can be. ONLY="p1 clip" picks problems, or parts of them: faces (p1), digits
# and ddim (p2), dann and clip (p3). JOBS=2: parts done at a time, each on its share of the cores (1 in full, else 2).
# CLASSIFIER=FILE: the course's Classifier.pth judges the MNIST-M digits too.
set -euo pipefail
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
profile=${PROFILE:-quick} default=hw2_data
if [ "$profile" = smoke ]; then default=hw2_data/smoke; fi # too little data for the other profiles
data_dir=$(absolute "${1:-$default}")
output_dir=$(absolute "${2:-output}")
if [ -n "${CLASSIFIER:-}" ]; then
    [ -f "$CLASSIFIER" ] || { echo "error: CLASSIFIER=$CLASSIFIER: no such file" >&2 && exit 2; }
    CLASSIFIER=$(absolute "$CLASSIFIER")
fi
only=${ONLY:-p1 p2 p3}
all_parts="digits faces dann clip ddim" # the longest first
part=${RUN_ALL_PART:-}                   # set by this script where it calls itself for one part
jobs=2
cd "$(dirname "$0")"

case "$profile" in
quick) # few steps: small nets and batches; batch statistics of each domain adapt sooner than the mixture's; the
    # diffusion models, hours from scratch on a CPU, begin with the released weights (of real images)
    faces=(--width 32 --batch-size 16 --lr 5e-4 --ema-decay 0.99 --augment translation)
    dcgan=("${faces[@]}" --epochs 2)
    wgangp=("${faces[@]}" --epochs 2 --n-critic 1 --drift 0.001)
    judge=(--width 16 --epochs 1 --images-per-epoch 16000 --batch-size 32 --augmentation 0)
    released=(--blocks 1 --patch 2 --prediction v --schedule cosine --lr 5e-4 --ema-decay 0.998)
    ddpm=(--net ddim --width 96 "${released[@]}" --init checkpoints/ddpm_digits.safetensors
        --shares 1 2 --batch-size 15 --images-per-epoch 3750 --epochs 2)
    digits=(--guidance 5 --per-class 20)
    face_ddpm=(--width 32 "${released[@]}" --init checkpoints/ddim_faces.safetensors
        --batch-size 16 --images-per-epoch 1200 --epochs 1)
    table=(--nets deep --seeds 0 --epochs 4 --images-per-epoch 3200 --batch-size 32
        --forward separate --lambda-max 0.5)
    clip=(--epochs 15) ;;
full)
    jobs=1 # of one GPU
    dcgan=(--augment translation)
    wgangp=(--augment translation --n-critic 1 --lr 2e-4 --drift 0.001)
    judge=()
    ddpm=(--net ddim --width 96 --blocks 1 --patch 2 --prediction v --schedule cosine --shares 2 3 --balance-classes
        --batch-size 720 --lr 1e-3 --images-per-epoch 500000 --epochs 38) # as the released weights were trained
    face_ddpm=(--width 64 --min-snr 5 --images-per-epoch 28000)
    table=(--nets deep cnn --seeds 0 1 2)
    clip=() ;;
smoke)
    dcgan=(--width 8 --epochs 1)
    wgangp=("${dcgan[@]}" --n-critic 1)
    short=(--epochs 1 --images-per-epoch 128)
    judge=("${short[@]}")
    ddpm=(--width 32 --schedule cosine --steps 4 "${short[@]}")
    face_ddpm=(--width 32 --schedule cosine --steps 4 --batch-size 16 --epochs 1 --images-per-epoch 32)
    table=(--nets cnn --seeds 0 "${short[@]}")
    clip=(--epochs 1)
    num_images=(--num-images 50)
    digits=(--per-class 5)
    ddim_options=(--steps 2)
    small=(--mnistm 200 60 --svhn 200 60 --usps 200 60 --face 64 40 --clip-zeroshot 48 24) ;;
*) echo "error: PROFILE=$profile: quick, full or smoke" >&2 && exit 2 ;;
esac
jobs=${JOBS:-$jobs}
case "$jobs" in *[!0-9]* | 0*) echo "error: JOBS=$jobs: how many parts at a time, at least 1" >&2 && exit 2 ;; esac
parts=()
for name in $only; do
    case "$name" in
    p1) parts+=(faces) ;;
    p2) parts+=(digits ddim) ;;
    p3) parts+=(dann clip) ;;
    *) if [[ " $all_parts " == *" $name "* ]]; then
        parts+=("$name")
    else
        echo "error: ONLY=$ONLY: p1 (faces), p2 (digits, ddim), p3 (dann, clip)" >&2 && exit 2
    fi ;;
    esac
done
source ./setup.sh

# step NAME FILE SCRIPT ARGUMENT...: runs a script that makes FILE, notes its command and seconds in steps/NAME.txt. A
# step is skipped if that command made FILE before, and no step before it in its problem has run again meanwhile.
changed=
step() {
    local name=$1 file=$2 start=$SECONDS note=$output_dir/steps/$1.txt status=0 command
    shift 2
    command=$(printf ' %q' python "$@")
    command=${command# }
    if [ -z "$changed" ] && [ -e "$file" ] && [ "$(head -n 1 "$note" 2>/dev/null)" = "$command" ]; then
        echo "= $name: done already: $file"
        return
    fi
    changed=yes
    rm -f "$note"
    echo "+ $command"
    python "$@" || status=$?
    if [ "$status" != 0 ]; then
        echo "error: the step $name failed; run again to continue: $command" >&2
        exit "$status"
    fi
    mkdir -p "$output_dir/steps"
    printf '%s\n' "$command" "$((SECONDS - start))" >"$note"
    echo "= $name: $((SECONDS - start)) s: $file"
}

# left_out WHAT: after a step that may fail; one that a signal ended ends the run all the same.
left_out() {
    local status=$?
    if [ "$status" -gt 128 ]; then exit "$status"; fi
    echo "left out: $1"
}

wanted() { [[ " ${parts[*]} " == *" $1 "* ]]; }

if [ -z "$part" ] && [ ! -d "$data_dir/clip_zeroshot" ] && { { [ ! -d "$data_dir/digits" ] && [ ! -d "$data_dir/face" ]; } ||
    grep -qs '"synthetic"' "$data_dir"/digits/*/made.json; }; then # none, or half made
    rm -rf "$output_dir/steps" # all follows the data
    step data "$data_dir" prepare_data.py synthetic --data-dir "$data_dir" ${small[@]+"${small[@]}"}
fi
if [ -z "$part" ]; then step check "$data_dir" prepare_data.py check "$data_dir"; fi

if [ "$jobs" -gt 1 ] && [ ${#parts[@]} -gt 1 ]; then # each part by this script; the longest first
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))} PYTHONUNBUFFERED=1 RUN_ALL_PART=yes
    for name in $all_parts; do if wanted "$name"; then echo "$name"; fi; done |
        xargs -I{} -P "$jobs" bash -c 'set -o pipefail; ONLY=$0 bash run_all.sh "$@" 2>&1 |
            (trap "" INT; while IFS= read -r line; do echo "$0 | $line"; done)' {} "$data_dir" "$output_dir" |
        (trap "" INT; exec cat) || # which ends when all have, after Ctrl-C too
        { echo "error: a part was not finished (above); run again to continue" >&2 && exit 1; }
    exec python report.py "$output_dir"
fi

p1=$output_dir/p1 changed=
if wanted faces && [ -d "$data_dir/face/train" ]; then
    step dcgan "$p1/dcgan" p1_dcgan.py train --data-dir "$data_dir" --output-dir "$p1/dcgan" "${dcgan[@]}"
    step wgangp "$p1/wgangp" p1_wgangp.py train --data-dir "$data_dir" --output-dir "$p1/wgangp" "${wgangp[@]}"
    for method in dcgan wgangp; do
        step "$method-sample" "$p1/first32_$method.png" "p1_$method.py" sample --output-dir "$p1/faces/$method" \
            --checkpoint "$p1/$method/model.safetensors" --grid "$p1/first32_$method.png" ${num_images[@]+"${num_images[@]}"}
        step "$method-faces" "$p1/score/$method-faces" score.py faces "$p1/faces/$method" \
            --real "$data_dir/face/val" --output-dir "$p1/score/$method-faces"
        step "$method-random" "$p1/score/$method-random" score.py fid "$p1/faces/$method" "$data_dir/face/val" \
            --floor "$data_dir/face/train" --features random --output-dir "$p1/score/$method-random"
        if [ "$profile" = full ]; then # needs the weights of the Inception net, which may not be at hand
            (step "$method-fid" "$p1/score/$method-fid" score.py fid "$p1/faces/$method" "$data_dir/face/val" \
                --output-dir "$p1/score/$method-fid") || left_out "FID of $method"
        fi
    done
fi

p2=$output_dir/p2 changed=
if wanted digits && [ -d "$data_dir/digits/mnistm" ] && [ -d "$data_dir/digits/svhn" ]; then
    step digits-ddpm "$p2/digits" p2_ddpm_train.py --data-dir "$data_dir" --output-dir "$p2/digits" \
        --domains mnistm svhn "${ddpm[@]}"
    step digits-sample "$p2/figures" p2_ddpm_infer.py --checkpoint "$p2/digits/model.safetensors" \
        --output-dir "$p2/generated" --figures-dir "$p2/figures" --guidance-sweep 0 1 2 3 5 \
        ${digits[@]+"${digits[@]}"}
    for domain in mnistm svhn; do
        step "judge-$domain" "$p2/judge-$domain" score.py train-classifier --data-dir "$data_dir" --domain "$domain" \
            --output-dir "$p2/judge-$domain" ${judge[@]+"${judge[@]}"}
        step "digits-$domain" "$p2/score/$domain" score.py digits "$p2/generated/$domain" --domain "$domain" \
            --classifier "$p2/judge-$domain/model.safetensors" --real "$data_dir" --output-dir "$p2/score/$domain"
    done
    if [ -n "${CLASSIFIER:-}" ]; then # the course's, whose verdict is the graders'
        step digits-course "$p2/score/course" score.py digits "$p2/generated/mnistm" --domain mnistm \
            --classifier "$CLASSIFIER" --real "$data_dir" --output-dir "$p2/score/course"
    elif [ -n "$changed" ]; then
        rm -rf "$p2/score/course" "$output_dir/steps/digits-course.txt" # of digits that are no more
    fi
fi
if wanted ddim; then
    changed= noises=$data_dir/face/noise net=$data_dir/face/UNet.pt
    if [ ! -f "$net" ] && [ -d "$data_dir/face/train" ]; then # the course's net, or one of our own
        net=$p2/faces/model.safetensors
        ddim_options+=(--spacing trailing --save-range fixed) # the defaults are for the course's net
        step faces-ddpm "$p2/faces" p2_ddpm_train.py --data-dir "$data_dir" --output-dir "$p2/faces" \
            --domains faces --net ddim "${face_ddpm[@]}"
        if [ ! -d "$noises" ]; then
            noises=$p2/noises
            step noises "$noises" prepare_data.py noises --output-dir "$noises"
        fi
    fi
    if [ -f "$net" ] && [ -d "$noises" ]; then
        ddim=(--noise-dir "$noises" --checkpoint "$net" ${ddim_options[@]+"${ddim_options[@]}"} --output-dir)
        step ddim-generate "$p2/ddim/generated" p2_ddim.py generate "${ddim[@]}" "$p2/ddim/generated"
        step ddim-eta "$p2/ddim/eta_grid.png" p2_ddim.py eta-grid "${ddim[@]}" "$p2/ddim"
        step ddim-interpolate "$p2/ddim/slerp.png" p2_ddim.py interpolate "${ddim[@]}" "$p2/ddim"
        if [ "$net" = "$data_dir/face/UNet.pt" ] && [ -d "$data_dir/face/GT" ]; then
            step ddim-mse "$p2/score/ddim" score.py mse "$p2/ddim/generated" "$data_dir/face/GT" \
                --output-dir "$p2/score/ddim"
        fi
    fi
fi

p3=$output_dir/p3 changed=
targets=()
for target in svhn usps; do
    if [ -d "$data_dir/digits/$target" ]; then targets+=("$target"); fi
done
if wanted dann && [ -d "$data_dir/digits/mnistm" ] && [ ${#targets[@]} -gt 0 ]; then
    step dann "$p3/table.png" p3_dann.py table --data-dir "$data_dir" --output-dir "$p3" \
        --targets "${targets[@]}" "${table[@]}"
    for target in "${targets[@]}"; do
        step "embed-$target" "$p3/figures/$target" p3_dann.py embed --data-dir "$data_dir" \
            --checkpoint "$p3/$target-${table[1]}-dann-seed0/model.safetensors" --output-dir "$p3/figures/$target"
    done
fi
if wanted clip; then
    changed=
    if [ -d "$data_dir/clip_zeroshot/train" ]; then
        step clip-pretrain "$p3/clip-small" p3_clip_zeroshot.py pretrain --data-dir "$data_dir" \
            --output-dir "$p3/clip-small" ${clip[@]+"${clip[@]}"}
        step clip "$p3/clip" p3_clip_zeroshot.py --data-dir "$data_dir" --output-dir "$p3/clip" \
            --checkpoint "$p3/clip-small/model.safetensors"
    elif [ -d "$data_dir/clip_zeroshot/val" ]; then # the course's, by the published weights
        (step clip "$p3/clip" p3_clip_zeroshot.py --data-dir "$data_dir" --output-dir "$p3/clip") ||
            left_out "zero-shot classification"
    fi
fi

if [ -z "$part" ]; then python report.py "$output_dir"; fi
