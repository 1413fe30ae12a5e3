#!/usr/bin/env bash
# 2024, problem 1: 500 digits each of MNIST-M and SVHN, 28x28, OUT/mnistm/0_001.png … OUT/svhn/9_050.png.
source "$(dirname "$(readlink -f "$0")")/../common.sh"
expect "OUT" "$@"
digits "$1/mnistm" 50 mnistm
digits "$1/svhn" 50 svhn
