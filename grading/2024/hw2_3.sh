#!/usr/bin/env bash
# 2024, problem 3: 25 images of each prompt of INPUT.json with Stable Diffusion v1 and learned words.
# The words are sd_words.safetensors beside MODEL.ckpt or in checkpoints/.
source "$(dirname "$(readlink -f "$0")")/../common.sh"
expect "INPUT.json OUT MODEL.ckpt" "$@"
words=()
if [ -n "${CHECKPOINTS:-}" ]; then words=(--embeddings "$CHECKPOINTS/sd_words.safetensors"); fi
"$python" "$root/p3_textual_inversion.py" generate "$1" "$2" "$3" ${words[@]+"${words[@]}"}
