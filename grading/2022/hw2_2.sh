#!/usr/bin/env bash
# 2022, problem 2: 1,000 MNIST-M digits of 28x28, 0_001.png … 9_100.png.
source "$(dirname "$(readlink -f "$0")")/../common.sh"
expect "OUT" "$@"
weights ddpm_digits "p2_ddpm_train.py --domains mnistm svhn"
"$python" "$root/p2_ddpm_infer.py" --checkpoint "$checkpoint" --output-dir "$1" --domains mnistm --per-class 100 \
    --sampler ddpm --steps 12 --guidance 4 --precision fp32
