#!/usr/bin/env bash
# Sets up .venv if needed, then runs the linter and the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source ./setup.sh
ruff check .
ruff format --check .
python -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@"
