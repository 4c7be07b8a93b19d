# Sourced by the scripts that start one process: the environment as in train.sh, and `run_once PYTHON_ARGUMENTS`.
MODULES=${MODULES:-}
VENV=${VENV:-$REPOSITORY/.venv}
CONTAINER=${CONTAINER:-}
PYTHON=${PYTHON:-python}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

cd "$REPOSITORY"
[[ -d ship_ds ]] || { echo "$REPOSITORY is no checkout of ship_ds: submit from one, or set REPOSITORY" >&2; exit 2; }
[[ -z $MODULES ]] || module load $MODULES
# shellcheck disable=SC1091
[[ ! -f $VENV/bin/activate ]] || source "$VENV/bin/activate"

# A --dry-run anywhere among the arguments prints the job instead.
run_once() {
    local arguments=() dry=
    for argument in "$@"; do
        if [[ $argument == --dry-run ]]; then dry=1; else arguments+=("$argument"); fi
    done
    local job=(srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" $CONTAINER "$PYTHON" -u "${arguments[@]}")
    if [[ -n $dry ]]; then
        grep '^#SBATCH' "${BASH_SOURCE[1]}"
        printf 'cd %q\n' "$REPOSITORY"
        printf '%q ' "${job[@]}"; echo
    else
        "${job[@]}"
    fi
}
