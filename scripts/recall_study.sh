#!/usr/bin/env bash
# Does a larger state help, and which initialisation? Many small models on one GPU; docs/results.md has the answer.
#
#   bash scripts/recall_study.sh                                  # a shard of 9 minutes; again: goes on (status 3 while runs are left)
#   bash scripts/recall_study.sh config=configs/study/cpu.json    # reduced, on a CPU
#   bash scripts/recall_study.sh plan=true                        # how many runs and tokens
#
# To go on on another machine, take along results=FILE and, of work=FOLDER, the folder named after the fingerprint (bases,
# and runs that were stopped); without it bases are made again. The corpus is made anew, and has to come out the same.
#
# Every key of configs/study/*.json can stand on the command line (seeds=0,1,2 workers=8); results=FILE work=FOLDER too.
# Tables and figures from the raw records: python -m benchmarks.recall_study.report
set -u
SCRIPT=$(basename "$0")
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"
cd "$(dirname "$0")/.." || exit 1
find_python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-true}"
exec "$PYTHON" -m benchmarks.recall_study "$@"
