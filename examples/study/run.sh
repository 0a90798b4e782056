#!/usr/bin/env bash
# One command: sets up .venv/, makes the study's runs (those that are missing), then its table and plots.
#
#   bash examples/study/run.sh [--seeds 0 1 2 ...] [--algorithms grpo dapo fipo] [--output-dir DIR] [--report-only]
#
# TORCH_INDEX_URL names another wheel index for torch (see examples/setup_env.sh).
set -euo pipefail
trap 'exit 130' INT TERM HUP

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
export OMP_NUM_THREADS=1 # the matrices are small: more threads only wait for each other
export TORCHDYNAMO_DISABLE=1

bash "$ROOT/examples/setup_env.sh"
cd "$ROOT"
exec "$ROOT/.venv/bin/python" "$ROOT/examples/study/study.py" "$@"
