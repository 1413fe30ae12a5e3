#!/usr/bin/env bash
# 2024, problem 3: textual inversion with Stable Diffusion v1: 25 images of each prompt of INPUT.json.
# The learned words are sd_words.safetensors beside MODEL.ckpt or in checkpoints/.
source "$(dirname "$(readlink -f "$0")")/../common.sh"
expect "INPUT.json OUT MODEL.ckpt" "$@"
"$python" "$root/p3_textual_inversion.py" generate "$1" "$2" "$3"
