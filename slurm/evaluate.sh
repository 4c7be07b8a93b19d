#!/usr/bin/env bash
# Evaluate a finished run in one process: sbatch slurm/evaluate.sh --run runs/quickstart --methods all
# The arguments are those of `ship-ds evaluate`. Variables as in train.sh; --dry-run prints the job.
#
#SBATCH --job-name=ship-ds-evaluate
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%j.out
set -euo pipefail
REPOSITORY=${REPOSITORY:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}
source "$REPOSITORY/slurm/one_process.sh"
run_once -m ship_ds.cli evaluate "$@"
