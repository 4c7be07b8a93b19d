#!/usr/bin/env bash
# Convert a run or checkpoint: sbatch slurm/convert.sh runs/quickstart --out converted
# The arguments are those of `ship-ds convert`. Variables as in train.sh; --dry-run prints the job.
#
#SBATCH --job-name=ship-ds-convert
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%j.out
set -euo pipefail
REPOSITORY=${REPOSITORY:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}
source "$REPOSITORY/slurm/one_process.sh"
run_once -m ship_ds.cli convert "$@"
