#!/usr/bin/env bash
# One command: sets up .venv/, builds a real 135M-parameter model, and teaches it small arithmetic with FIPO.
#
#   bash examples/quickstart.sh [--algorithm fipo|dapo|grpo] [--seed N]
#
# TORCH_INDEX_URL names another wheel index for torch (see setup_env.sh). Further flags are those of quickstart.py.
set -euo pipefail
trap 'exit 130' INT TERM HUP

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
MODEL=$ROOT/runs/models/SmolLM2-135M-Instruct
export OMP_NUM_THREADS=1 # two spinning threads per process are several times slower on a busy machine

bash "$ROOT/examples/setup_env.sh"
"$ROOT/.venv/bin/python" "$ROOT/tools/prepare_smollm2.py" --save "$MODEL" >&2
exec "$ROOT/.venv/bin/python" "$ROOT/examples/quickstart.py" --hf-checkpoint "$MODEL" "$@"
