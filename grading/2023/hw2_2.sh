#!/usr/bin/env bash
# 2023, problem 2: a face 00.png for each noise 00.pt, with DDIM and the course's UNet.pt or checkpoints/ddim_faces.safetensors.
source "$(dirname "$(readlink -f "$0")")/../common.sh"
expect "NOISE_DIR OUT UNET.pt" "$@"
"$python" "$root/p2_ddim.py" generate --noise-dir "$1" --output-dir "$2" --checkpoint "$3"
