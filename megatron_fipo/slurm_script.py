"""The one sbatch file of a job: plain bash, to be read, kept and submitted again by hand."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence

from megatron_fipo.interruption import REQUEUE
from megatron_fipo.slurm_options import SEED, SlurmJob
from megatron_fipo.train import LOST_RANK, USER_ERROR

FIRST_PORT, NUM_PORTS = 20000, 10000  # below those that Linux hands out by itself
_SEED_DIR = '/"seed-$SEED"'

_ENDING = """
# srun names the node and the ranks of what failed. A rank that ends with {requeue} has saved as it was asked to,
# as when another one fails: that is no failure of its own, though srun takes the highest status of all.
failures() {{ sed -nE 's/^srun: error: ([^ :]+): tasks? ([0-9]+)[^:]*: (.*)$/\\1 \\2 \\3/p' "$LOGS/srun.log"; }}
first_status() {{ sed -nE 's/.* Exited with exit code ([0-9]+)$/\\1/p' | grep -vx {requeue} | head -n 1; }}

# Sets NODE, RANK and REASON to the first of: a rank that a signal or its node ended, one that said why, any other.
find_failure() {{
    local log found
    NODE= RANK= REASON=
    found=$(failures | grep -v -e 'Exited with exit code' -e 'Terminated' | head -n 1)
    if [[ -z $found ]]; then
        for log in "$LOGS"/rank-*.log; do
            REASON=$(grep '^error: ' "$log" | grep -vF {lost_rank} | head -n 1)
            if [[ -n $REASON ]]; then
                log=${{log##*/rank-}} && log=${{log%.log}}
                RANK=${{log%%-*}} NODE=${{log#*-}}
                return
            fi
        done
        found=$(failures | grep -v '{saved}' | head -n 1)
    fi
    [[ -n $found ]] || return
    read -r NODE RANK REASON <<<"$found"
    log=$(grep -v '^slurmstepd' "$LOGS/rank-$RANK-$NODE.log" 2>/dev/null | grep . | tail -n 1)
    REASON="$REASON${{log:+; its last line: $log}}"
}}

# The job again: it goes on from its checkpoint (--auto-resume). Not once somebody has cancelled it.
requeue() {{
    if [[ $(squeue --noheader --format %T --jobs "$SLURM_JOB_ID" 2>/dev/null) != RUNNING ]]; then
        printf 'job %s: cancelled, or already requeued; not requeued here\\n' "$NAME"
    elif ((${{SLURM_RESTART_COUNT:-0}} >= {max_requeues})); then
        printf 'job %s: not requeued: that was done {max_requeues} times (--max-requeues)\\n' "$NAME"
    else
        printf 'job %s: requeued, %s\\n' "$NAME" "$1"
        trap '' TERM # Slurm ends this script now, which has a line to go
        scontrol requeue "$SLURM_JOB_ID"
        [[ -z ${{2:-}} ]] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$2"
    fi
}}

if [[ $status == 0 ]]; then
    printf 'job %s: finished\\n' "$NAME"
    exit 0
fi
if failures | grep -q '{saved}' && ! failures | grep -qv -e '{saved}' -e 'Terminated$'; then
    {when_saved}
    exit {requeue}
fi
[[ $status != {requeue} ]] || status=$(failures | first_status)
status=${{status:-1}}
find_failure
if [[ -n $RANK ]]; then
    printf 'job %s: rank %s on %s failed: %s (%s)\\n' "$NAME" "$RANK" "$NODE" "$REASON" "$LOGS/rank-$RANK-$NODE.log"
else
    printf 'job %s: failed with status %s; the logs are in %s\\n' "$NAME" "$status" "$LOGS"
fi
{when_failed}exit "$status"
"""

_RETRY = """# A user's error ({user_error}) would only come again.
if [[ $status != {user_error} && -n $NODE ]]; then
    printf '%s\\n' "$NODE" >>"$FAILURES"
    if (($(wc -l <"$FAILURES") <= {max_failures})); then
        requeue "without $NODE" "{excluded}$(sort -u "$FAILURES" | paste -sd ,)"
    fi
fi
"""


def sbatch_script(job: SlurmJob, command: Sequence[str]) -> str:
    """The file's text; `command` is what it was written by."""
    shown = " ".join(quoted(word) for word in command)
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Written by: {shown}",
            *_directives(job),
            "set -u",
            *_rendezvous(job),
            *_setup(job),
            *_arguments(job),
            *_srun(job),
            _ending(job).lstrip("\n"),
        ]
    )


def quoted(word: str) -> str:
    """A word of bash that is exactly `word`, on one line whatever is in it."""
    if not re.search(r"[\x00-\x1f\x7f]", word):
        return shlex.quote(word)
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    plain = (escapes.get(c) or (f"\\x{ord(c):02x}" if ord(c) < 32 or ord(c) == 127 else c) for c in word)
    return "$'" + "".join(plain) + "'"


def log_name(job: SlurmJob) -> str:
    """The job's name among the logs, as sbatch's pattern: its id, and within an array the array's and the index."""
    return "%A_%a" if job.seeds else "%j"


def _directives(job: SlurmJob) -> list[str]:
    options = {"job-name": "fipo", **job.sbatch, "nodes": str(job.nodes), "ntasks-per-node": str(job.ranks_per_node)}
    lines = [f"--{name}={_directive_value(value)}" if value else f"--{name}" for name, value in options.items()]
    log_dir = job.log_dir.replace("%", "%%")
    lines += [f'--output="{log_dir}/{log_name(job)}.log"', "--open-mode=append"]
    lines.append("--requeue" if job.requeue else "--no-requeue")
    if job.signal_before_s is not None:
        lines.append(f"--signal=USR1@{job.signal_before_s}")
    if job.seeds:
        throttle = f"%{job.concurrent_seeds}" if job.concurrent_seeds else ""
        lines.append(f"--array=0-{len(job.seeds) - 1}{throttle}")
    return [f"#SBATCH {line}" for line in (*lines, *job.sbatch_lines)] + [""]


def _directive_value(value: str) -> str:
    """sbatch reads double quotes much as bash does; values with some of their own are refused before."""
    return value if re.fullmatch(r"[\w@%+=:,./\[\]&|*()-]+", value) else f'"{value}"'


def _rendezvous(job: SlurmJob) -> list[str]:
    port = str(job.master_port) if job.master_port else f"$(({FIRST_PORT} + SLURM_JOB_ID % {NUM_PORTS}))"
    return [
        "",
        "# Where the ranks meet: rank 0 is on the first node. The rest they know from srun's own variables.",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"MASTER_PORT={port}",
        "export MASTER_ADDR MASTER_PORT",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1",
    ]


def _setup(job: SlurmJob) -> list[str]:
    return ["", "# --setup", *job.setup] if job.setup else []


def _arguments(job: SlurmJob) -> list[str]:
    """The program and its arguments as a bash array, a flag and its values per line."""
    lines: list[list[str]] = []
    for word in job.program:
        if not lines or word.startswith("--"):
            lines.append([])
        lines[-1].append(quoted(word))
    text = ["", "PROGRAM=(", *(f"    {' '.join(line)}" for line in lines), ")"]
    if job.seeds:
        text += [
            "",
            "# A run per seed, in directories of its own: what is said last about a flag holds.",
            f"SEEDS=({' '.join(map(str, job.seeds))})",
            "SEED=${SEEDS[$SLURM_ARRAY_TASK_ID]}",
            f'PROGRAM+=({SEED} "$SEED")',
            *(f"PROGRAM+=({flag} {quoted(value)}{_SEED_DIR})" for flag, value in job.own_dirs.items()),
        ]
    return text


def _srun(job: SlurmJob) -> list[str]:
    options = ["--kill-on-bad-exit=1", "--cpu-bind=none"]
    if "cpus-per-task" in job.sbatch:
        options.append(f"--cpus-per-task={job.sbatch['cpus-per-task']}")
    options += [f"--{name}={quoted(value)}" if value else f"--{name}" for name, value in job.container.items()]
    options += [quoted(option) for option in job.srun_options]
    name = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" if job.seeds else "$SLURM_JOB_ID"
    directory = quoted(job.log_dir)
    pattern = quoted(job.log_dir.replace("%", "%%"))
    python = job.python or ("python3" if job.container else sys.executable)
    return [
        "",
        "# Every start of the job has a directory of logs, one file per rank.",
        f"NAME={name}",
        f'LOGS={directory}/"$NAME.${{SLURM_RESTART_COUNT:-0}}"',
        *([f'FAILURES={directory}/"$NAME.failed-nodes"'] if job.max_failures else []),
        'mkdir -p "$LOGS"',
        "printf 'job %s: start %s on %s, ranks meet at %s:%s, logs in %s\\n' \\",
        '    "$NAME" "${SLURM_RESTART_COUNT:-0}" "$SLURM_JOB_NODELIST" "$MASTER_ADDR" "$MASTER_PORT" "$LOGS"',
        "",
        "# One task per rank; when one fails, the others are ended. Ranks are not bound to cores: the first of a node",
        "# starts the node's engines, which need more than its own.",
        f"srun {' '.join(options)} \\",
        f'    --output={pattern}/"$NAME.${{SLURM_RESTART_COUNT:-0}}/rank-%t-%N.log" \\',
        f'    {quoted(python)} "${{PROGRAM[@]}}" 2>"$LOGS/srun.log"',
        "status=$?",
        'cat "$LOGS/srun.log" >&2',
        "",
    ]


def _ending(job: SlurmJob) -> str:
    values = {
        "requeue": REQUEUE,
        "saved": f"Exited with exit code {REQUEUE}$",
        "user_error": USER_ERROR,
        "max_failures": job.max_failures,
    }
    excluded = f"{job.sbatch['exclude']}," if "exclude" in job.sbatch else ""
    when_saved = "requeue 'to go on from its checkpoint'" if job.requeue else "printf 'job %s: saved\\n' \"$NAME\""
    return _ENDING.format(
        **values,
        max_requeues=job.max_requeues,
        lost_rank=quoted(LOST_RANK),
        when_saved=when_saved,
        when_failed=_RETRY.format(**values, excluded=excluded) if job.max_failures else "",
    )
