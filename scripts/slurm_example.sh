#!/usr/bin/env bash
# A run over several machines under SLURM, one launcher a machine:
#
#   sbatch scripts/slurm_example.sh                                       # the settings below
#   sbatch --nodes=4 scripts/slurm_example.sh mamba2_StateX.sh tokens_per_step=1048576   # another script, other settings
#
# A step of the published recipe is 8 sequences: more than 8 GPUs need a larger one, as in the second line.
# Ten minutes before the time limit SLURM sends SIGUSR1: the run saves a checkpoint and leaves with status 75, the job puts
# itself back into the queue, and resume=auto goes on from there. `output/` has to be on a file system that all nodes see.
#SBATCH --job-name=statex
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

script=gla_StateX.sh
case "${1:-}" in *.sh) script=$1 && shift ;; esac
gpus_per_node=${SLURM_GPUS_ON_NODE:-4}

# sbatch runs a copy of this file, so the repository is where the job was submitted
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
main_address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# a port of its own for every job, so that two jobs that share a node do not meet
main_port=$((20000 + SLURM_JOB_ID % 20000))

# SLURM_NODEID differs between the tasks, so it is read inside them
srun --kill-on-bad-exit=0 bash -c '
    script=$1 && shift
    exec bash "scripts/$script" node_rank="$SLURM_NODEID" "$@"' launcher "$script" \
    n_nodes="$SLURM_NNODES" n_gpus=$((SLURM_NNODES * gpus_per_node)) \
    main_address="$main_address" main_port="$main_port" resume=auto "$@"
status=$?

if [ "$status" -eq 75 ]; then
    echo "stopped by a signal with everything saved: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
