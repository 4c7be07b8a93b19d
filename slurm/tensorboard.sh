#!/usr/bin/env bash
# TensorBoard on a node: sbatch slurm/tensorboard.sh runs; the job's output has the ssh line that brings it to your machine.
# PORT chooses the port (the job's id does otherwise). Variables as in train.sh; --dry-run prints the job.
#
#SBATCH --job-name=ship-ds-tensorboard
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%j.out
set -euo pipefail
REPOSITORY=${REPOSITORY:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}
source "$REPOSITORY/slurm/one_process.sh"
PORT=${PORT:-$((6006 + ${SLURM_JOB_ID:-0} % 1000))}
echo "ssh -L $PORT:$(hostname):$PORT LOGIN_NODE    then open http://localhost:$PORT"
run_once -m tensorboard.main --logdir "$@" --host 0.0.0.0 --port "$PORT"
