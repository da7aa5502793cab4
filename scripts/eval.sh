#!/usr/bin/env bash
# Evaluate models side by side; every argument goes to `python -m eval` (help: bash scripts/eval.sh --help).
#
#   bash scripts/eval.sh model=output/statex/gla-1.3B/run/ckpt_20000,huggingface/gla-1.3B-100B lengths=4K,64K limit=50
#   bash scripts/eval.sh model=scripted:oracle tasks=mqar,passkey output=eval_output/try     # no model, no download
set -u
SCRIPT=$(basename "$0")
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"
cd "$(dirname "$0")/.." || exit 1
find_python
exec "$PYTHON" -m eval "$@"
