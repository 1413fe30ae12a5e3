#!/usr/bin/env bash
# 2024, problem 3: textual inversion, which is not part of this project yet.
source "$(dirname "$(readlink -f "$0")")/../common.sh"
expect "INPUT.json OUT MODEL.ckpt" "$@"
fail 1 "error: textual inversion (2024, problem 3) is not part of this project yet: $2 is not written"
