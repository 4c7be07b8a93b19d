#!/usr/bin/env bash
# Train on a Slurm cluster: one process per GPU, or per task on CPU nodes. Preempted, out of time, or after the loss of a
# node, the job is requeued and goes on from its last checkpoint.
#
#   sbatch slurm/train.sh --config lora-8b model.task_llm.base=MODEL data.path=DATA                        # one node of 8 GPUs
#   sbatch --nodes=4 --time=12:00:00 slurm/train.sh --config lora-8b model.task_llm.base=MODEL data.path=DATA \
#       training.tasks_per_step=128                                                      # sbatch's options before the script
#   sbatch --gres=none --ntasks-per-node=2 --cpus-per-task=1 slurm/train.sh --config quickstart            # without GPUs
#   sbatch --array=0-4 slurm/train.sh --config quickstart run.seed=%a run.folder=runs/seed-%a              # %a: the index
#   SWEEP=sweep.txt sbatch --array=1-6 slurm/train.sh --config quickstart run.folder=runs/sweep-%a         # + its line %a
#   slurm/train.sh --dry-run --config quickstart                                         # print the job, start nothing
#
#SBATCH --job-name=ship-ds
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

# Variables: set them before `sbatch`, which hands the environment on, or edit them here; environment.sh has the others.
REPOSITORY=${REPOSITORY:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}  # submit from the checkout
SWEEP=${SWEEP:-}                            # a file of overrides, one line an array index; # and empty lines do not count
MAX_FAILURES=${MAX_FAILURES:-3}             # requeues after crashes or hangs with no new checkpoint in between
MAX_PREEMPTIONS=${MAX_PREEMPTIONS:-10}      # the same after preemptions
RETRY_SECONDS=${RETRY_SECONDS:-10}          # between tries to requeue, of which there are 12
# The network: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface, NCCL_IB_HCA the InfiniBand card; NCCL_DEBUG=INFO
# says what was chosen. MASTER_ADDR and MASTER_PORT replace the first node's name and the job's own port.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Ranks on GPUs need both, since what is on the CPU goes by gloo. It takes one whole name, and NCCL also the beginnings of
# several, or ^ before those to leave out: only what is an interface here is handed on.
INTERFACE=${NCCL_SOCKET_IFNAME:-}
INTERFACE=${INTERFACE#=}
if [[ -z ${GLOO_SOCKET_IFNAME:-} && -n $INTERFACE && -e /sys/class/net/$INTERFACE ]]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE
fi

fail() { echo "slurm/train.sh: $*" >&2; exit 2; }

DRY=
ARGUMENTS=()
for ARGUMENT in "$@"; do
    if [[ $ARGUMENT == --dry-run ]]; then DRY=1; else ARGUMENTS+=("$ARGUMENT"); fi
done
cd "$REPOSITORY"
[[ -d ship_ds ]] || fail "$REPOSITORY is no checkout of ship_ds: submit from one, or set REPOSITORY"
source slurm/environment.sh

INDEX=${SLURM_ARRAY_TASK_ID:-}
if [[ -n $SWEEP && -z $INDEX ]]; then
    [[ -n $DRY ]] || fail "SWEEP=$SWEEP has a line for each array index, and this job is in no array: submit with --array=1-N, or unset SWEEP"
    INDEX=1
    echo "slurm/train.sh: SWEEP: this is the job of line 1; SLURM_ARRAY_TASK_ID=N before the command prints that of line N" >&2
fi
if [[ -n $INDEX ]]; then
    if [[ -n $SWEEP ]]; then
        LINES=$($CONTAINER "$PYTHON" -m ship_ds.runtime.sweep "$SWEEP" "$INDEX")
        mapfile -t MORE <<<"$LINES"
        ARGUMENTS+=("${MORE[@]}")
    fi
    OWN_FOLDER=
    # The last one holds, as in the config.
    for ARGUMENT in "${ARGUMENTS[@]}"; do
        [[ $ARGUMENT != run.folder=* ]] || OWN_FOLDER=$ARGUMENT
    done
    [[ $OWN_FOLDER == *%a* ]] ||
        fail "an array needs %a in run.folder, such as run.folder=runs/seed-%a; else its jobs share a folder"
    ARGUMENTS=("${ARGUMENTS[@]//%a/$INDEX}")
fi

# Bad input ends here, in seconds and with one line, before the ranks start and load a model.
RUN=$($CONTAINER "$PYTHON" -m ship_ds.runtime.preflight "${ARGUMENTS[@]}")
LOGS=$RUN/logs/job-${SLURM_JOB_ID:-N}
# The ranks need no `scontrol`, which containers lack.
if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
    SHIP_DS_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd ' ')
    export SHIP_DS_NODES
fi
# --wait, not --kill-on-bad-exit: ranks that were preempted leave one by one with 75, and all of them have to.
JOB=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=120 --open-mode=append --output="$LOGS/rank-%t.log"
     $CONTAINER "$PYTHON" -u -m ship_ds.train "${ARGUMENTS[@]}")
if [[ -n $DRY ]]; then
    grep '^#SBATCH' "${BASH_SOURCE[0]}"
    printf 'cd %q\n' "$REPOSITORY"
    printf 'export %s\n' "NCCL_DEBUG=$NCCL_DEBUG" "HF_HUB_OFFLINE=$HF_HUB_OFFLINE" "OMP_NUM_THREADS=$OMP_NUM_THREADS" \
        "TORCH_EXTENSIONS_DIR=$TORCH_EXTENSIONS_DIR" "SLURM_EXPORT_ENV=$SLURM_EXPORT_ENV"
    printf '%q ' "${JOB[@]}"; echo
    exit
fi

mkdir -p "$LOGS"
echo "$(date -Is) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}: logs in $LOGS"
# Where a rank ends with 2, others are killed, and `srun` may return their 137: it leaves its line here (bad_input.py).
export SHIP_DS_BAD_INPUT=$LOGS/bad-input-${SLURM_RESTART_COUNT:-0}
rm -f "$SHIP_DS_BAD_INPUT"
# What follows in the logs is of this start.
declare -A BEGINS
for FILE in "$LOGS"/rank-*.log; do
    [[ ! -f $FILE ]] || BEGINS[$FILE]=$(stat -c %s "$FILE")
done
trap true TERM  # the ranks get it too, save and leave; this script has to outlive them
set +e
"${JOB[@]}"
CODE=$?
set -e
[[ ! -e $SHIP_DS_BAD_INPUT ]] || CODE=2

# Of each rank the last `ship-ds:` line, and its very last one, such as a trace ends with; what several say comes once.
last_lines() {
    local file
    while read -r file; do
        tail -c "+$((${BEGINS[$file]:-0} + 1))" "$file" | tr -d '\000' | awk -v rank="$(basename "$file" .log)" '
            /^ship-ds: / { said = $0 }
            NF { last = $0 }
            END { if (said != "") print rank "\t" said; if (last != said) print rank "\t" last }'
    done < <(find "$LOGS" -name 'rank-*.log' | sort -V) | awk -F '\t' '
        # The same but for numbers: of a rank, a port, a process.
        { line = substr($0, length($1) + 2); kind = line; gsub(/[0-9]+/, "#", kind) }
        !(kind in count) { order[++num_kinds] = kind; first[kind] = $1 ": " line }
        { count[kind]++ }
        END {
            for (i = 1; i <= num_kinds; i++) {
                more = count[order[i]] - 1
                print first[order[i]] (more ? " (and " more " more)" : "")
            }
        }'
}
# The last job of an array has the array's own id, by which Slurm means all of its jobs.
ID=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || ID=${SLURM_ARRAY_JOB_ID}_$INDEX
# count WHAT LIMIT: end the job where this has happened more often than LIMIT says with no new checkpoint in between.
count() {
    local counted=$LOGS/$1 newest
    newest=$(cat "$RUN/checkpoints/latest" 2>/dev/null || echo the start)
    echo "$(date -Is) code $CODE after $newest" >>"$counted"
    if (($(grep -c " after $newest\$" "$counted") > ${!2})); then
        echo "more than $2=${!2} $1 after $newest: not requeued"
        exit "$CODE"
    fi
}
# requeue WHY WHAT LIMIT: Slurm's controller may not answer for a minute or two, and nobody else would requeue the job.
requeue() {
    local state try said=
    for ((try = 0; try < 12; try++)); do
        state=$(squeue --noheader --jobs "$ID" --format %T) || state=  # empty: nobody knows
        # Only what still runs: Slurm requeues a preempted job by itself, and a cancelled one is not to come back. Nor is what
        # the last try requeued though it failed: `scontrol` was ended with the job.
        [[ -z $state || $state == RUNNING ]] || exit "$CODE"
        if [[ $state == RUNNING ]]; then
            # Before it is, since Slurm then ends this script.
            if [[ -z $said ]]; then
                count "$2" "$3"
                said="$(date -Is) $1: requeued"
                echo "$said"
            fi
            ! scontrol requeue "$ID" || exit "$CODE"
        fi
        sleep "$RETRY_SECONDS" || true  # TERM ends it, and not this script
    done
    echo "slurm/train.sh: job $ID could not be requeued: sbatch the same command again" >&2
    exit "$CODE"
}
case $CODE in
    0) echo "$(date -Is) done: $RUN" ;;
    2)  if [[ -s $SHIP_DS_BAD_INPUT ]]; then cat "$SHIP_DS_BAD_INPUT"; else last_lines || true; fi ;;
    # Counted too, or a time limit that is shorter than loading would bring it back for ever. 138: by USR1 while the ranks
    # were starting, with nothing to save.
    75|138) requeue "preempted (code $CODE)" preemptions MAX_PREEMPTIONS ;;
    *)  last_lines || true
        requeue "failed with code $CODE (76: hung, 77: not saved in time)" failures MAX_FAILURES ;;
esac
exit "$CODE"
