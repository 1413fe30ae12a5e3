#!/usr/bin/env bash
# bash run_all.sh [DATA_DIR] [OUTPUT_DIR] [--profile quick|scratch|full|smoke] [--only ...] [--dry-run] ...
# Sets up .venv, then run_all.py does the rest; `bash run_all.sh --help` lists its options.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
exec python "$(dirname "$0")/run_all.py" "$@"
