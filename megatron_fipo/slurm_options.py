"""The options of `megatron_fipo.launch --slurm`, mostly sbatch's own under its names, and what they must agree on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fipo.config import require

PROGRAM = "megatron_fipo.train"
LONGEST_EARLY_S = 60  # how much earlier than asked for Slurm may send a signal
WRITES_TO = ("--save", "--output-dir", "--export-hf", "--record-rollouts", "--tensorboard-dir", "--config-logger-dir")
SEED = "--seed"

# sbatch's options that take a value, and those that may stand alone
_SBATCH = frozenset(
    "account begin comment constraint cpus-per-gpu cpus-per-task deadline dependency exclude exclusive export gpus "
    "gpus-per-node gres job-name licenses mail-type mail-user mem mem-per-cpu mem-per-gpu network nice nodelist nodes "
    "ntasks-per-node partition priority profile qos reservation switches time time-min tmp wckey".split()
)
_SBATCH_ALONE = frozenset("contiguous exclusive hold nice reboot spread-job".split())
_SHORT = {
    "-A": "--account",
    "-C": "--constraint",
    "-c": "--cpus-per-task",
    "-G": "--gpus",
    "-J": "--job-name",
    "-N": "--nodes",
    "-p": "--partition",
    "-q": "--qos",
    "-t": "--time",
    "-w": "--nodelist",
    "-x": "--exclude",
}
_TORCHRUN = {"--nnodes": "--nodes", "--nproc-per-node": "--ntasks-per-node"}
# pyxis' options of srun
_CONTAINER = frozenset("image mounts workdir name save env".split())
_CONTAINER_SWITCHES = ("mount-home", "remap-root", "entrypoint", "entrypoint-log", "writable", "readonly")
_CONTAINER_ALONE = frozenset(
    [
        *(f"container-{name}" for name in _CONTAINER_SWITCHES),
        *(f"no-container-{name}" for name in _CONTAINER_SWITCHES[:3]),
    ]
)
_OURS = frozenset(
    "array-seeds log-dir master-port max-failures max-requeues python sbatch-option setup signal-before-s "
    "srun-option".split()
)
_OURS_ALONE = frozenset("dry-run follow requeue no-requeue help".split())
_REPEATED = frozenset(("sbatch-option", "setup", "srun-option"))
REFUSED = {
    "array": "--array-seeds makes a job array of runs with a seed and directories of their own",
    "chdir": "the job runs in the directory that it is submitted from",
    "error": "the logs lie in --log-dir",
    "gpu-bind": "every rank must see all GPUs of its node: say --gpus-per-node",
    "gpus-per-task": "every rank must see all GPUs of its node: say --gpus-per-node",
    "ntasks": "the ranks are --nodes x --ntasks-per-node",
    "open-mode": "the job's log is appended to when it is requeued",
    "output": "the logs lie in --log-dir",
    "signal": "say --signal-before-s: the ranks get SIGUSR1 that many seconds before the time limit",
    "wait": "say --follow, which shows the logs as well",
    "wrap": "say -m megatron_fipo.train ... or a script",
}


@dataclass(frozen=True)
class SlurmJob:
    """What is to be submitted."""

    nodes: int
    ranks_per_node: int
    sbatch: Mapping[str, str]  # sbatch's options without dashes; "" for those that take no value
    container: Mapping[str, str]  # pyxis', likewise
    program: tuple[str, ...]  # what the interpreter runs: ("-m", module) or (script,), and its arguments
    log_dir: str
    python: str | None = None  # None: the one that submits, or python3 in a container
    requeue: bool = True
    signal_before_s: int | None = None  # None: no signal, as nothing would be saved
    seeds: tuple[int, ...] = ()
    concurrent_seeds: int | None = None
    max_requeues: int = 100
    max_failures: int = 0
    master_port: int | None = None
    sbatch_lines: tuple[str, ...] = ()
    srun_options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    @property
    def own_dirs(self) -> Mapping[str, str]:
        """Flags of the directories that the program writes to, as far as it is told any."""
        found = ((flag, flag_value(self.program, flag)) for flag in WRITES_TO)
        return {flag: value for flag, value in found if value is not None}


@dataclass(frozen=True)
class SlurmCommand:
    """The job, and what is to be done with it."""

    job: SlurmJob
    is_dry: bool
    follows: bool


def read_command(words: Sequence[str]) -> SlurmCommand:
    """What `--slurm` was given: options up to `-m MODULE` or a script, then that program's own arguments.

    Raises ValueError naming the option, the value found and the value wanted.
    """
    options, program = _split(words)
    values: dict[str, list[str]] = {}
    for name, value in options:
        if name in values and name not in _REPEATED and values[name] != [value]:
            raise ValueError(f"--{name} is given twice, as {values[name][0]!r} and {value!r}")
        values.setdefault(name, []).append(value)
    one = {name: found[-1] for name, found in values.items()}
    require(bool(program), "the program", " ".join(program), "given after the options, as -m megatron_fipo.train ...")
    nodes = _whole(one, "nodes", 1)
    sbatch = {name: value for name, value in one.items() if name in _SBATCH | _SBATCH_ALONE}
    container = {name: value for name, value in one.items() if name.removeprefix("no-").startswith("container-")}
    require(
        not container or "container-image" in container or "container-name" in container,
        "--container-image",
        None,
        f"given with --{next(iter(container), '')}",
    )
    seeds, concurrent = _seeds(one.get("array-seeds"))
    require("requeue" not in one or "no-requeue" not in one, "--requeue", "given", "absent with --no-requeue")
    job = SlurmJob(
        nodes=nodes,
        ranks_per_node=_ranks_per_node(one),
        sbatch=sbatch,
        container=container,
        program=tuple(program),
        log_dir=_log_dir(one.get("log-dir"), program, in_container=bool(container)),
        python=one.get("python"),
        requeue="no-requeue" not in one,
        signal_before_s=_signal_before(one, program),
        seeds=seeds,
        concurrent_seeds=concurrent,
        max_requeues=_whole(one, "max-requeues", 100, least=0),
        max_failures=_whole(one, "max-failures", 0, least=0),
        master_port=_whole(one, "master-port", 0) or None,
        sbatch_lines=tuple(values.get("sbatch-option", ())),
        srun_options=tuple(values.get("srun-option", ())),
        setup=tuple(values.get("setup", ())),
    )
    _check(job)
    return SlurmCommand(job, is_dry="dry-run" in one, follows="follow" in one)


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether --help is among the options, and not among the program's arguments."""
    return not words or any(name == "help" for name, _ in _split(words)[0])


def flag_value(program: Sequence[str], flag: str) -> str | None:
    """What the program's arguments say last about `flag`; "" for a flag without a value, None where it is absent."""
    found = None
    for word, following in zip(program, [*program[1:], "--"]):
        if word == flag:
            found = "" if following.startswith("--") else following
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def seconds_of(time: str) -> float:
    """A time limit as Slurm writes it, in seconds: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or UNLIMITED."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    wanted = "as sbatch wants it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]"
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    require(found is not None, "--time", time, wanted)
    assert found is not None
    days, *parts = (int(part) if part is not None else None for part in found.groups())
    given = [part for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*given, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *given, 0], 2: [0, *given], 3: given}[len(given)]
    total = ((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds
    require(total > 0, "--time", time, "longer than nothing")
    return float(total)


def _split(words: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Options as (name, value), and the words from the program on."""
    options: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest[0]
        if word in ("-m", "--module"):
            require(len(rest) > 1, word, None, "followed by a module")
            return options, ["-m", *rest[1:]]
        if not word.startswith("-"):
            return options, rest
        rest.pop(0)
        flag, has_value, value = word.partition("=")
        if word[:2] in _SHORT and not word.startswith("--"):
            flag, has_value, value = _SHORT[word[:2]], word[2:], word[2:].removeprefix("=")
        flag = _TORCHRUN.get(flag.replace("_", "-") if flag.startswith("--n") else flag, flag)
        name = flag.removeprefix("--") if flag != "-h" else "help"
        _check_known(flag, name)
        stands_alone = name in _SBATCH_ALONE | _OURS_ALONE | _CONTAINER_ALONE
        if has_value:
            require(name not in _OURS_ALONE | _CONTAINER_ALONE, flag, value, "given without a value")
        elif not stands_alone:
            require(bool(rest) and rest[0] != "-m", flag, None, "followed by a value")
            value = rest.pop(0)
        options.append((name, value))
    return options, []


def _check_known(flag: str, name: str) -> None:
    known = (
        _SBATCH | _SBATCH_ALONE | _OURS | _OURS_ALONE | _CONTAINER_ALONE | {f"container-{word}" for word in _CONTAINER}
    )
    if name in known and flag in (f"--{name}", "-h"):
        return
    if name in REFUSED:
        raise ValueError(f"{flag} is not an option here: {REFUSED[name]}")
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean --{close[0]}?" if close else "see --slurm --help"
    raise ValueError(f'unknown option {flag} of --slurm; {hint} (any line for sbatch: --sbatch-option "{flag}=...")')


def _whole(values: Mapping[str, str], name: str, default: int, *, least: int = 1) -> int:
    text = values.get(name)
    if text is None:
        return default
    require(text.isdecimal() and int(text) >= least, f"--{name}", text, f"a whole number >= {least}")
    return int(text)


def _ranks_per_node(values: Mapping[str, str]) -> int:
    """--ntasks-per-node, or one rank for each of the GPUs that a node is asked for."""
    asked = values.get("gpus-per-node", "")
    if "gres" in values and not asked:
        found = re.search(r"(?:^|,)(?:gres:)?gpu((?::[^,]+)?)(?:,|$)", values["gres"])
        asked = (found[1].removeprefix(":") or "1") if found else ""
    wanted = "a count of each node's GPUs, as in 8, h100:8, or gpu:8 for --gres; or say --ntasks-per-node"
    is_told = "ntasks-per-node" in values
    require(
        "gpus" not in values or is_told,
        "--gpus",
        values.get("gpus"),
        "given as --gpus-per-node, or with --ntasks-per-node: ranks are one per GPU of a node",
    )
    is_read = asked == "" or re.fullmatch(r"(?:[\w.-]+:)?\d+", asked) is not None
    flag = "gpus-per-node" if "gpus-per-node" in values else "gres"
    is_one = values.get("gres", "").count("gpu") < 2
    require(is_told or (is_read and is_one), f"--{flag}", values.get(flag), wanted)
    count = asked.rpartition(":")[2]
    num_gpus = int(count) if count.isdecimal() else None
    num_ranks = _whole(values, "ntasks-per-node", num_gpus or 1)
    require(
        num_gpus is None or num_ranks <= num_gpus,
        "--ntasks-per-node",
        num_ranks,
        f"at most the GPUs of a node ({num_gpus}): each rank has one of its own",
    )
    return num_ranks


def _seeds(text: str | None) -> tuple[tuple[int, ...], int | None]:
    """ "1,2,7-9%2": the seeds 1, 2, 7, 8 and 9, two of them at a time."""
    if text is None:
        return (), None
    wanted = "seeds as in 1,2,7-9, and perhaps %2 for two at a time"
    found = re.fullmatch(r"(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)(?:%([1-9]\d*))?", text)
    require(found is not None, "--array-seeds", text, wanted)
    assert found is not None
    seeds: list[int] = []
    for part in found[1].split(","):
        first, _, last = part.partition("-")
        require(int(last or first) - int(first) in range(1000), "--array-seeds", text, wanted)
        seeds += range(int(first), int(last or first) + 1)
    require(len(set(seeds)) == len(seeds), "--array-seeds", text, "without a seed twice")
    return tuple(seeds), int(found[2]) if found[2] else None


def _log_dir(given: str | None, program: Sequence[str], *, in_container: bool) -> str:
    if given is None:
        require(not in_container, "--log-dir", None, "given with a container: logs are written outside of it")
        output_dir = flag_value(program, "--output-dir")
        require(bool(output_dir), "--log-dir", None, "given where the program has no --output-dir")
        given = f"{output_dir}/slurm"
    bad = re.search(r"[\"'\\\x00-\x1f]", given)
    require(given != "" and bad is None, "--log-dir", given, "a directory without quotes, backslashes or line breaks")
    return given


def _signal_before(values: Mapping[str, str], program: Sequence[str]) -> int | None:
    """How long before the time limit the ranks are asked to save and end: what they may take for it, and what Slurm
    may be late by."""
    if flag_value(program, "--save") is None:
        require("signal-before-s" not in values, "--signal-before-s", values.get("signal-before-s"), "used with --save")
        return None
    grace = flag_value(program, "--exit-grace-s") or "120"
    is_number = re.fullmatch(r"\d+(\.\d*)?", grace) is not None
    before_s = _whole(values, "signal-before-s", int(float(grace)) + LONGEST_EARLY_S if is_number else 180)
    require(before_s < 65536, "--signal-before-s", before_s, "< 65536 seconds")
    if "time" in values:
        require(
            before_s < seconds_of(values["time"]),
            "--time",
            values["time"],
            f"longer than --signal-before-s ({before_s} s; by default --exit-grace-s and {LONGEST_EARLY_S} s more)",
        )
    return before_s


def _check(job: SlurmJob) -> None:
    """What must hold between options and the program's arguments."""
    if "time" in job.sbatch:
        seconds_of(job.sbatch["time"])
    for name, value in (*job.sbatch.items(), *(("sbatch-option", line) for line in job.sbatch_lines)):
        require(re.search(r"[\x00-\x1f\"\\]", value) is None, f"--{name}", value, 'without ", \\ and line breaks')
    for line in job.sbatch_lines:
        require(line.startswith("-"), "--sbatch-option", line, 'an option of sbatch, as in "--x=y"')
        name = re.split(r"[=\s]", line.removeprefix("--"))[0]
        require(name not in REFUSED, "--sbatch-option", line, f"something else: {REFUSED.get(name)}")
        require(name not in ("array", "requeue", "no-requeue"), "--sbatch-option", line, "said without --sbatch-option")
    for word in (*job.setup, *job.program):
        require("\0" not in word, "an argument", word, "without a NUL character")
    if job.master_port is not None:
        require(1024 <= job.master_port < 65536, "--master-port", job.master_port, "in [1024, 65536)")
    if job.requeue:
        for flag in ("--save", "--auto-resume"):
            require(
                flag_value(job.program, flag) is not None,
                f"{flag} of the program",
                None,
                "given where the job is requeued, so that it goes on where it was, or say --no-requeue",
            )
    without_nodes = job.requeue and "nodelist" not in job.sbatch
    require(
        without_nodes or job.max_failures == 0, "--max-failures", job.max_failures, "0 with --no-requeue or --nodelist"
    )
    if job.seeds:
        require(flag_value(job.program, SEED) is None, SEED, flag_value(job.program, SEED), "absent with --array-seeds")
        for flag in ("--output-dir", *job.own_dirs):
            require(
                bool(flag_value(job.program, flag)), flag, flag_value(job.program, flag), "given with --array-seeds"
            )
