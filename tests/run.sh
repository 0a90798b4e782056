#!/usr/bin/env bash
# Sets up what is missing, then runs the tests:
#   bash tests/run.sh [unit|kernels|tools|distributed|e2e|faults|faults all|cluster|all] [pytest arguments]
#
# `unit` includes ruff and mypy; `kernels` runs the Triton kernels under Triton's interpreter, on the CPU; `faults`
# injects a fixed choice of faults, `faults all` every one. `cluster` runs on a Slurm and in network namespaces of its
# own; it needs root, installs Debian's Slurm and iproute2 where they are missing, and is run only when it is asked
# for: `all` leaves it out. Stops at the first part that fails. However it ends, no process is left behind.
set -euo pipefail

# A shell that starts this in its background makes it ignore SIGINT, which bash cannot undo by itself.
if [[ -z ${TESTS_RUN_REEXECUTED:-} ]]; then
    TESTS_RUN_REEXECUTED=1 exec env --default-signal=INT,TERM bash "$0" "$@"
fi
unset TESTS_RUN_REEXECUTED

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
PYTHON=$ROOT/.venv/bin/python
MARK=TESTS_RUN_ID=$$-$RANDOM$RANDOM # in the environment of every process of this run, and of theirs
CHILD=

survivors() {
    grep -lsazE "^$MARK\$" /proc/[0-9]*/environ | cut -d / -f 3 || true
}

# Runs a command in a process group of its own, so that a signal to this script alone reaches all of it.
run() {
    set -m
    env "$MARK" "$@" </dev/null &
    CHILD=$!
    set +m
    local status=0
    wait "$CHILD" || status=$?
    CHILD=
    local left tick
    for tick in {1..30}; do
        left=$(survivors)
        [[ -n $left ]] || break
        sleep 0.5 # some are on their way out: torch_shm_manager waits 2 s for new clients when its last one is gone
    done
    if [[ -n $left ]]; then
        printf 'left running by %s:\n' "$*" >&2
        # shellcheck disable=SC2086
        ps -o pid=,args= -p "${left//$'\n'/,}" >&2 || true
        kill -KILL $left 2>/dev/null || true
        status=1
    fi
    return "$status"
}

stop() {
    trap '' INT TERM HUP PIPE
    printf 'tests: interrupted\n' >&2 || true # whoever read this may have been interrupted too
    if [[ -n $CHILD ]]; then
        kill -INT -- "-$CHILD" 2>/dev/null || true
        local tick left
        for tick in {1..100}; do # pytest ends its own processes first
            kill -0 "$CHILD" 2>/dev/null || break
            sleep 0.1
        done
        for tick in {1..10}; do
            left=$(survivors)
            [[ -n $left ]] || break
            sleep 0.1
        done
        # shellcheck disable=SC2086
        [[ -z $left ]] || kill -KILL $left 2>/dev/null || true
    fi
    exit 130
}
trap stop INT TERM HUP

part() {
    local name=$1
    shift
    printf '== tests: %s\n' "$name" >&2
    local status=0
    if [[ $name == unit ]]; then
        run "$PYTHON" -m ruff check . || status=1
        run "$PYTHON" -m ruff format --check --quiet . || status=1
        run "$PYTHON" -m mypy || status=1
        [[ $status == 0 ]] || return 1
    fi
    [[ $name != cluster ]] || cluster_programs || return 1
    local settings=()
    if [[ $name == kernels ]]; then
        run bash examples/setup_env.sh kernels || return 1
        settings=(TRITON_INTERPRET=1 "PYTHONPATH=$ROOT/.venv/kernels${PYTHONPATH:+:$PYTHONPATH}")
    elif [[ $name == tools ]]; then
        run bash examples/setup_env.sh quantize || return 1
        settings=("PYTHONPATH=$ROOT/.venv/quantize${PYTHONPATH:+:$PYTHONPATH}")
    fi
    local choice=()
    if [[ $name == faults ]]; then
        [[ $ALL_FAULTS == 0 ]] || choice=(--all-faults)
        # a caller that selects tests wants no certain number of faults
        [[ $# -gt 0 && $1 != --fault-table ]] || choice+=(--least-faults "${LEAST_FAULTS[$ALL_FAULTS]}")
    fi
    run "${settings[@]}" "$PYTHON" -m pytest "tests/$name" "${choice[@]}" "$@" || status=$?
    # 5: nothing collected, which is right when the caller selected the tests
    [[ $status == 0 ]] || { [[ $status == 5 && $# -gt 0 ]]; }
}

# What the cluster part needs and Debian has: Slurm's commands and daemons, munge, and `ip`.
cluster_programs() {
    local missing=() program
    for program in sbatch slurmctld slurmd munged ip; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("$program")
    done
    local install=(apt-get install -y --no-install-recommends slurm-wlm slurmctld slurmd munge iproute2)
    if [[ $(id -u) != 0 ]]; then
        [[ ${#missing[@]} == 0 ]] || printf 'tests: %s missing; install with: sudo %s\n' "${missing[*]}" "${install[*]}" >&2
        printf 'tests: cluster needs root, for namespaces and daemons; run: sudo bash tests/run.sh cluster\n' >&2
        return 1
    fi
    [[ ${#missing[@]} != 0 ]] || return 0
    printf 'tests: installing %s\n' "${install[*]:4}" >&2
    local said
    # RUNLEVEL: no daemon is started; the tests start theirs with a configuration of their own
    if ! said=$(export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 && apt-get update -qq 2>&1 && "${install[@]}" 2>&1); then
        printf '%s\ntests: this failed: %s\n' "$said" "${install[*]}" >&2
        return 1
    fi
}

PARTS=(unit kernels tools distributed e2e faults)
ALL_FAULTS=0
LEAST_FAULTS=(300 600) # of the fixed choice, and of all
case ${1:-all} in
    unit | kernels | tools | distributed | e2e | cluster) PARTS=("$1") && shift ;;
    faults)
        PARTS=(faults) && shift
        [[ ${1:-} != all ]] || { ALL_FAULTS=1 && shift; }
        ;;
    all) shift $(($# > 0)) ;;
    -* | *::* | */*) ;; # pytest arguments alone
    *)
        printf 'tests/run.sh: %s is no part of the tests; parts are unit, kernels, tools, distributed, e2e, faults, cluster, all\n' "$1" >&2
        exit 2
        ;;
esac

if [[ ${#PARTS[@]} -gt 1 ]]; then
    printf 'tests: without the cluster part (bash tests/run.sh cluster: Slurm and network namespaces, needs root)\n' >&2
fi
cd "$ROOT"
export OMP_NUM_THREADS=1
export SPT_NOENV=1 # SGLang's setproctitle keeps the environment, and with it the mark, readable in /proc
run bash examples/setup_env.sh
for name in "${PARTS[@]}"; do
    part "$name" "$@" || {
        printf '== tests: %s failed\n' "$name" >&2
        exit 1
    }
done
