"""The one sbatch file of a job: plain bash, to be read, kept and submitted again by hand."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from collections.abc import Sequence

from megatron_fipo.interruption import LAUNCHER_PID, REQUEUE
from megatron_fipo.slurm_options import PROGRAM, SEED, SlurmJob
from megatron_fipo.train import LOST_RANK, USER_ERROR

# variables in which launchers say who a rank is
LAUNCHED = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
)
FIRST_PORT, NUM_PORTS = 20000, 10000  # below those that Linux hands out by itself
MOST_IDLE_STARTS = 3
_SEED_DIR = '/"seed-$SEED"'

_ENDING = """
# srun says what failed, with its node and ranks, in the order in which it happened. After the first failure it ends the
# other ranks: those save ({requeue}), are terminated, or are killed when they take longer than KillWait.
read_failures() {{
    sed -nE -e 's/^srun: error: Task launch for .* failed on node ([^: ]+): (.*)$/\\1 - task launch: \\2/p' \\
        -e 's/^srun: error: Node failure on ([^ ,]+).*$/\\1 - node failure/p' \\
        -e 's/^srun: error: ([^ :]+): tasks? ([0-9]+)[^:]*: (.*)$/\\1 \\2 \\3/p'
}}
CAUSES=$(sed -E '/Terminating StepId|Force Terminated|Job step aborted/Q' "$LOGS/srun.log" | read_failures)
[[ -n $CAUSES ]] || CAUSES=$(read_failures <"$LOGS/srun.log")
SAVED='Exited with exit code ({saved})$|User defined signal 1$' # the signal may come before a rank knows --save
FAILURE=$(grep -vE "$SAVED|Terminated$" <<<"$CAUSES" | grep . | head -n 1)

# The reason that a rank gave itself, if it did; that others are gone is none.
said_by() {{ grep '^error: ' "$1" 2>/dev/null | grep -vF {lost_rank} | head -n 1; }}

# Sets NODE, RANK and REASON to what failed first, and BLAMED to its node where that is certain.
find_failure() {{
    local log last
    read -r NODE RANK REASON <<<"$FAILURE"
    BLAMED=$NODE
    [[ $RANK != - ]] || return
    if [[ $REASON == 'Exited with exit code '* ]]; then
        for log in "$LOGS/rank-$RANK-$NODE.log" "$LOGS"/rank-*.log; do
            last=$(said_by "$log")
            if [[ -n $last ]]; then
                log=${{log##*/rank-}} && log=${{log%.log}}
                RANK=${{log%%-*}} NODE=${{log#*-}} REASON=$last
                BLAMED=$NODE
                return
            fi
        done
        ! grep -qF {lost_rank} "$LOGS/rank-$RANK-$NODE.log" || BLAMED=
    fi
    last=$(grep -v '^slurmstepd' "$LOGS/rank-$RANK-$NODE.log" 2>/dev/null | grep . | tail -n 1)
    REASON="$REASON${{last:+; its last line: $last}}"
}}

# Slurm may be too busy to answer.
again() {{
    local try
    for try in {{1..6}}; do
        "$@" && return
        sleep 10
    done
    return 1
}}
state() {{ again squeue --noheader --format %T --jobs "$NAME" 2>/dev/null || echo RUNNING; }}

# The job again: it goes on from its checkpoint (--auto-resume). Not once somebody has cancelled it.
requeue() {{
    if [[ $(state) != RUNNING ]]; then
        printf 'job %s: cancelled, or already requeued; not requeued here\\n' "$NAME"
    elif ((${{SLURM_RESTART_COUNT:-0}} >= {max_requeues})); then
        printf 'job %s: not requeued: that was done {max_requeues} times (--max-requeues)\\n' "$NAME"
    else
        trap '' TERM # Slurm ends this script then, which has a line to go
        if again scontrol requeue "$NAME"; then
            printf 'job %s: requeued, %s\\n' "$NAME" "$1"
            [[ -z ${{2:-}} ]] || scontrol update JobId="$NAME" ExcNodeList="$2"
        else
            printf 'job %s: not requeued: Slurm did not take it\\n' "$NAME"
        fi
    fi
}}

if [[ $status == 0 ]]; then
    printf 'job %s: finished\\n' "$NAME"
    exit 0
fi
if [[ -z $FAILURE ]] && grep -qE "$SAVED" <<<"$CAUSES"; then
    {when_saved}
    exit {requeue}
fi
if [[ $FAILURE == *'Exited with exit code '* ]]; then
    status=${{FAILURE##* }}
elif [[ $status == {requeue} ]]; then
    status=1
fi
if [[ -n $FAILURE ]]; then
    find_failure
    if [[ $RANK == - ]]; then
        printf 'job %s: %s failed: %s (%s)\\n' "$NAME" "$NODE" "$REASON" "$LOGS/srun.log"
    else
        printf 'job %s: rank %s on %s failed: %s (%s)\\n' "$NAME" "$RANK" "$NODE" "$REASON" "$LOGS/rank-$RANK-$NODE.log"
    fi
else
    printf 'job %s: failed with status %s; the logs are in %s\\n' "$NAME" "$status" "$LOGS"
fi
{when_failed}exit "$status"
"""

_RETRY = """# A user's error ({user_error}) would only come again. "-": it is not certain which node it was.
if [[ $status != {user_error} && -n $FAILURE ]]; then
    printf '%s\\n' "${{BLAMED:--}}" >>"$FAILURES"
    if (($(wc -l <"$FAILURES") <= {max_failures})); then
        EXCLUDED=$({{ {excluded}grep -vx -e - "$FAILURES"; }} | sort -u | paste -sd ,)
        requeue "${{BLAMED:+without }}${{BLAMED:-after a failure}}" "$EXCLUDED"
    fi
fi
"""
_GO_ON = """# Starts that only ask for more of the same end here.
    if [[ $(cat {latest} 2>/dev/null) != "$STEP" ]]; then
        rm -f "$IDLE"
    else
        printf '%s\\n' "${{SLURM_RESTART_COUNT:-0}}" >>"$IDLE"
    fi
    if [[ -e $IDLE ]] && (($(wc -l <"$IDLE") >= {most_idle_starts})); then
        printf 'job %s: not requeued: {most_idle_starts} starts in a row saved no step; is --time too short?\\n' "$NAME"
    else
        requeue 'to go on from its checkpoint'
    fi"""


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
        "# What a launcher left in the shell that this was submitted from is not about these ranks.",
        f"unset {' '.join(LAUNCHED)} ${{!TORCHELASTIC_@}} {LAUNCHER_PID}",
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
    options = ["--export=ALL", "--kill-on-bad-exit=1", "--cpu-bind=none", "--distribution=block"]
    if "cpus-per-task" in job.sbatch:
        options.append(f"--cpus-per-task={quoted(job.sbatch['cpus-per-task'])}")
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
        *_idle_starts(job, directory),
        'mkdir -p "$LOGS"',
        "printf 'job %s: start %s on %s, ranks meet at %s:%s, logs in %s\\n' \\",
        '    "$NAME" "${SLURM_RESTART_COUNT:-0}" "$SLURM_JOB_NODELIST" "$MASTER_ADDR" "$MASTER_PORT" "$LOGS"',
        "",
        "# One task per rank; when one fails, the others are ended. Ranks are not bound to cores: the first of a node",
        "# starts the node's engines, which need more than its own. sbatch's --export is for this script alone.",
        f"srun {' '.join(options)} \\",
        f'    --output={pattern}/"$NAME.${{SLURM_RESTART_COUNT:-0}}/rank-%t-%N.log" \\',
        f'    {quoted(python)} "${{PROGRAM[@]}}" 2>"$LOGS/srun.log"',
        "status=$?",
        'cat "$LOGS/srun.log" >&2',
        "",
    ]


def _counts_idle_starts(job: SlurmJob) -> bool:
    """Whether the script can see by the checkpoints that nothing comes of the job's starts."""
    return job.requeue and not job.container and job.program[:2] == ("-m", PROGRAM)


def _idle_starts(job: SlurmJob, directory: str) -> list[str]:
    if not _counts_idle_starts(job):
        return []
    return [f'IDLE={directory}/"$NAME.idle-starts"', f"STEP=$(cat {_latest(job)} 2>/dev/null)"]


def _latest(job: SlurmJob) -> str:
    """The file that names the newest checkpoint, as a word of bash."""
    return quoted(job.own_dirs["--save"]) + (_SEED_DIR if job.seeds else "") + "/latest"


def _ending(job: SlurmJob) -> str:
    values = {
        "requeue": REQUEUE,
        "saved": f"{REQUEUE}|{128 + signal.SIGUSR1}" if job.requeue else REQUEUE,
        "user_error": USER_ERROR,
        "max_failures": job.max_failures,
    }
    excluded = f"printf '%s\\n' {quoted(job.sbatch['exclude'])}; " if "exclude" in job.sbatch else ""
    when_saved = "printf 'job %s: saved\\n' \"$NAME\""
    if job.requeue:
        when_saved = "requeue 'to go on from its checkpoint'"
    if _counts_idle_starts(job):
        when_saved = _GO_ON.format(latest=_latest(job), most_idle_starts=MOST_IDLE_STARTS)
    return _ENDING.format(
        **values,
        max_requeues=job.max_requeues,
        lost_rank=quoted(LOST_RANK),
        when_saved=when_saved,
        when_failed=_RETRY.format(**values, excluded=excluded) if job.max_failures else "",
    )
