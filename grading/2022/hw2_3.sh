#!/usr/bin/env bash
# 2022, problem 3: a csv of labels for a folder of SVHN or USPS images; its path or DOMAIN says which.
source "$(dirname "$(readlink -f "$0")")/../common.sh"
expect "IMAGE_DIR OUT.csv" "$@"
domain_of "$1"
weights "dann_$domain" "p3_dann.py train --target $domain"
"$python" "$root/p3_dann.py" predict --checkpoint "$checkpoint" --image-dir "$1" --output-csv "$2"
