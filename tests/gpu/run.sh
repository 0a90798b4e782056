#!/usr/bin/env bash
# Runs all checks that need a GPU and prints a table: check, result, seconds, reason. What a check lacks (packages, GPUs,
# a newer GPU) skips it, with the reason; torch, triton and numpy are enough for the kernels'.
#
#   bash tests/gpu/run.sh [--only TEXT] [--list] [--log-dir DIR]        PYTHON names another interpreter
#
# Exit status: 0 none failed, 1 one failed, 2 no GPU, 3 every check was skipped, 130 interrupted.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ ! -x $ROOT/.venv/bin/python ]] || PYTHON=$ROOT/.venv/bin/python
fi
cd "$ROOT"
exec "$PYTHON" tests/gpu/run_checks.py "$@"
