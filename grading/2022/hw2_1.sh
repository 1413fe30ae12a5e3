#!/usr/bin/env bash
# 2022, problem 1: 1,000 faces of 64x64, 0000.png … 0999.png.
FACES=${FACES:-wgangp} # or dcgan
source "$(dirname "$(readlink -f "$0")")/../common.sh"
expect "OUT" "$@"
case $FACES in dcgan | wgangp) ;; *) fail 2 "error: FACES=$FACES: dcgan or wgangp" ;; esac
weights "${FACES}_faces" "p1_$FACES.py train"
"$python" "$root/p1_$FACES.py" sample --checkpoint "$checkpoint" --output-dir "$1" --num-images 1000
