#!/usr/bin/env bash
# 2023, problem 1: 1,000 MNIST-M digits of 28x28, 0_001.png … 9_100.png.
source "$(dirname "$(readlink -f "$0")")/../common.sh"
expect "OUT" "$@"
digits "$1" 100 mnistm
