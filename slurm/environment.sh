# Sourced by train.sh and one_process.sh, which have REPOSITORY and `fail`: what every process finds, on whichever node.
# Variables: set them before `sbatch`, which hands the environment on, or edit them here.
MODULES=${MODULES:-}                        # to `module load`, such as "cuda/12.6 gcc/13"
VENV=${VENV:-$REPOSITORY/.venv}             # activated where it exists
CONTAINER=${CONTAINER:-}                    # put before every command, such as "apptainer exec --nv image.sif"
PYTHON=${PYTHON:-python}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$REPOSITORY/.build/torch_extensions}
# Where jobs are submitted with --export=NONE, `srun` would take that over, and its tasks would have none of this.
export SLURM_EXPORT_ENV=ALL

# What defines `module`, what it loads and what activates an environment read variables that are not set.
set +u
if [[ -n $MODULES ]]; then
    # A shell that is no login shell, or started with --export=NONE, may not have it yet.
    for INIT in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh; do
        # shellcheck disable=SC1090
        if ! declare -F module >/dev/null && [[ -f $INIT ]]; then source "$INIT"; fi
    done
    declare -F module >/dev/null ||
        fail "MODULES=$MODULES: there is no \`module\` on $(hostname), nor a file in /etc/profile.d that defines it: unset MODULES"
    module load $MODULES
fi
# shellcheck disable=SC1091
[[ ! -f $VENV/bin/activate ]] || source "$VENV/bin/activate"
set -u
