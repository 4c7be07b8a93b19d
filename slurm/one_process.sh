# Sourced by the scripts that start one process: the environment as in train.sh, and `run_once PYTHON_ARGUMENTS`.
fail() { echo "$*" >&2; exit 2; }

cd "$REPOSITORY"
[[ -d ship_ds ]] || fail "$REPOSITORY is no checkout of ship_ds: submit from one, or set REPOSITORY"
source slurm/environment.sh
unset SHIP_DS_NODES  # of the training job that submitted this one, where one did

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
