#!/usr/bin/env bash
# 2024, problem 1: 500 digits each of MNIST-M and SVHN, 28x28, OUT/mnistm/0_001.png … OUT/svhn/9_050.png.
source "$(dirname "$(readlink -f "$0")")/../common.sh"
expect "OUT" "$@"
weights ddpm_digits "p2_ddpm_train.py --domains mnistm svhn"
"$python" "$root/p2_ddpm_infer.py" --checkpoint "$checkpoint" --output-dir "$1" --domains mnistm svhn --per-class 50 \
    --sampler ddpm --steps 12 --guidance 4 --precision fp32
