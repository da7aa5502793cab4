#!/usr/bin/env bash
# Everything a change has to pass: lint, format, the tests, and the tiny path once through a real script.
#
#   bash scripts/test.sh                          # all of it
#   bash scripts/test.sh tests/models -k gla      # arguments go to pytest; then only the tests run
set -euo pipefail
cd "$(dirname "$0")/.."

# two cores, several processes: one thread each is faster than threads that wait for each other
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false

bash scripts/setup.sh dev=true
python=.venv/bin/python

if [ $# -gt 0 ]; then exec "$python" -m pytest "$@"; fi

echo "test: lint and format"
"$python" -m ruff check .
"$python" -m ruff format --check .

echo "test: the tiny path, through the real scripts, with few steps"
output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT
bash scripts/gla_StateX.sh scale=tiny plan=true output_dir="$output"
bash scripts/quickstart.sh base_steps=4 post_steps=4 output_dir="$output"

echo "test: pytest"
"$python" -m pytest --durations=15
