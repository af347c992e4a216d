"""A run as a Slurm job: a folder with the code and the config as they are now, and a script that can be read.

The job is told to save some time before its limit. Slurm signals its batch script alone (--signal=B:), which hands the
signal to srun, and srun to the agent of each machine: sent to all processes instead, it would end helpers that know no
such signal. A run that ended well and is not at its last step was stopped: the script puts the job back into the queue,
where the same script resumes it. That also covers a preemption, which Slurm announces to the agents by SIGTERM.
"""

import argparse
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch import snapshot

OPTION = re.compile(r"[a-z][a-z0-9-]*")
# What the script relies on.
OWN = ("nodes", "ntasks", "ntasks-per-node", "signal", "requeue", "no-requeue", "open-mode", "chdir", "array")
SUBMITTED = re.compile(r"(\d+)(?:;.*)?\s*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--slurm", action="store_true", help="submit the run as a job of --nodes machines")
    slurm.add_argument("--dry-run", action="store_true", help="only show the job's script; needs no Slurm")
    slurm.add_argument("--time", help="limit, as Slurm writes it, such as 24:00:00 (default: the partition's)")
    slurm.add_argument("--save-time", metavar="SECONDS", type=int, help="to save in, before the limit (default: 300)")
    slurm.add_argument("--gpus-per-node", metavar="N", type=int, help="also the default of --nproc")
    slurm.add_argument("--cpus-per-node", metavar="N", type=int, help="default: the whole machines, to itself")
    for name in ("partition", "account", "qos", "job-name"):
        slurm.add_argument(f"--{name}", metavar="NAME")
    words = "any other option of sbatch; may be repeated"
    slurm.add_argument("--sbatch", metavar="KEY=VALUE", action="append", default=[], help=words)


def refuse_without_slurm(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that would do nothing."""
    names = (
        "dry_run",
        "time",
        "save_time",
        "gpus_per_node",
        "cpus_per_node",
        "partition",
        "account",
        "qos",
        "job_name",
    )
    for name in (*names, "sbatch"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for a Slurm job; add --slurm, or leave it out")


@dataclasses.dataclass(frozen=True)
class Job:
    """folder: of this launch. work: where the job runs, to which relative paths belong. last: the checkpoint of the
    run's last step. options: of sbatch, in order; "" for one without a value. arguments: of `weft launch` after CONFIG.
    plugins: the copies of what WEFT_PLUGINS names.
    """

    folder: Path
    work: Path
    last: Path
    options: Mapping[str, str]
    arguments: tuple[str, ...]
    plugins: str

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def script(self) -> Path:
        return self.folder / "job.sh"


def job(args: argparse.Namespace, run: Path, last_step: str, nproc: int, environment: Mapping[str, str]) -> Job:
    """What `args` ask for; run: the run's folder. Raises ValueError for what no job can be."""
    if args.fresh:
        raise ValueError("--fresh would start anew whenever the job returns from the queue; use another run.dir")
    if args.rdzv_endpoint is not None:
        raise ValueError("--rdzv-endpoint is for machines that are started by hand; leave it out with --slurm")
    save_time = 300 if args.save_time is None else args.save_time
    if not 1 <= save_time <= 65535:
        raise ValueError(f"--save-time is {save_time}; Slurm takes 1 to 65535 seconds")
    if args.time is not None and (limit := seconds(args.time)) <= save_time:
        raise ValueError(
            f"--time {args.time} is {limit} s, and the run is told to save {save_time} s before its end; "
            "give more --time, or less --save-time"
        )
    number = 1
    while (folder := run / f"launch-{number}").exists():
        number += 1
    folder = folder.absolute()
    arguments = [f"--nproc={nproc}", f"--max-restarts={args.max_restarts}", f"--shutdown-timeout={save_time}"]
    if args.stop_after is not None:
        arguments.append(f"--stop-after={args.stop_after}")
    plugins = snapshot.plugins_of(folder / "code", environment)
    return Job(
        folder,
        Path.cwd(),
        (run / last_step).absolute(),
        options(args, folder, save_time),
        tuple(arguments),
        plugins,
    )


def options(args: argparse.Namespace, folder: Path, save_time: int) -> dict[str, str]:
    """Of sbatch: first what was asked for by name, then any others, which win."""
    found = {
        "job-name": args.job_name or folder.parent.name,
        "nodes": str(args.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": args.gpus_per_node,
        "cpus-per-task": args.cpus_per_node,
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "output": f"{folder}/%j.out".replace("%", "%%").replace("%%j.out", "%j.out"),
        "open-mode": "append",
        "signal": f"B:USR1@{save_time}",
        "requeue": "",
    }
    if args.cpus_per_node is None:
        found["exclusive"] = ""
    for item in args.sbatch:
        name, _, value = item.partition("=")
        if not OPTION.fullmatch(name) or "\n" in value:
            raise ValueError(f"--sbatch is {item!r}; write an option of sbatch, such as --sbatch mem=64G")
        if name in OWN:
            raise ValueError(f"--sbatch {item} would break how the job saves and resumes; leave {name} out")
        found[name] = value
    return {name: str(value) for name, value in found.items() if value is not None}


def seconds(limit: str) -> int:
    """Of a time limit in one of Slurm's forms."""
    forms = (
        r"(?P<m>\d+)(:(?P<s>\d+))?",
        r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)",
        r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?",
    )
    for form in forms:
        if match := re.fullmatch(form, limit):
            sizes = {"d": 86400, "h": 3600, "m": 60, "s": 1}
            return sum(int(number) * sizes[unit] for unit, number in match.groupdict().items() if number)
    raise ValueError(f"--time is {limit!r}; write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 24:00:00")


def exported(job: Job) -> dict[str, str]:
    """The job's variables beside those of the shell that submits it, as bash reads them."""
    ours = {"PYTHONPATH": shlex.quote(str(job.code)) + '"${PYTHONPATH:+:$PYTHONPATH}"', "PYTHONSAFEPATH": "1"}
    return ours | ({"WEFT_PLUGINS": shlex.quote(job.plugins)} if job.plugins else {})


def render(job: Job, command: str) -> str:
    """The job's script; command: how it was made."""
    directives = [f"#SBATCH --{name}" + (f"={quoted(value)}" if value else "") for name, value in job.options.items()]
    exports = [f"export {name}={value}" for name, value in exported(job).items()]
    launch = [
        f"{shlex.quote(sys.executable)} -u -m launch.cli launch {shlex.quote(str(job.config))}",
        f'--nodes="$SLURM_JOB_NUM_NODES" {" ".join(map(shlex.quote, job.arguments))}',
        '--rdzv-endpoint="$(hostname):$port" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Made by: {command}",
            *directives,
            "",
            "# The code and the config are those of the submission; relative paths begin here.",
            f"cd {shlex.quote(str(job.work))} || exit 1",
            *exports,
            "",
            "# Before the time limit Slurm signals this script alone, which hands it on: the run saves and ends.",
            "trap 'kill -USR1 \"$step\"' USR1",
            "",
            "# One task on each machine: an agent that starts the processes there. They find one another through the",
            "# machine that this script runs on, the first. Left alone, srun would give a task one CPU.",
            "port=$((20000 + SLURM_JOB_ID % 20000))",
            'srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \\',
            *[f"    {line} \\" for line in launch[:-1]],
            f"    {launch[-1]} &",
            "step=$!",
            "# A signal ends a wait early, hence several.",
            'wait "$step"',
            'while kill -0 "$step" 2> /dev/null; do wait "$step"; done',
            'wait "$step"',
            "code=$?",
            "",
            "# It ended well, or by the signal while it started, and not at its last step: it was stopped.",
            "# Back into the queue, to be resumed.",
            f"last={shlex.quote(str(job.last))}",
            "case $code in 0 | 138 | 143)",
            '    [ -e "$last" ] || scontrol requeue "$SLURM_JOB_ID"',
            "esac",
            "exit $code",
            "",
        ]
    )


def quoted(value: str) -> str:
    """For a directive, which sbatch splits at blanks, and whose quotes it takes off."""
    if '"' in value and "'" in value:
        raise ValueError(f"{value!r} has both kinds of quotes, which no #SBATCH line can hold; use another name")
    if re.fullmatch(r"[\w./:@%+,=-]+", value):
        return value
    return f"'{value}'" if '"' in value else f'"{value}"'


def submit(job: Job, script: str, config: str, environment: Mapping[str, str]) -> str:
    """Write the job's folder and hand its script to Slurm; returns the job's id."""
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not on this machine; log in to one of the cluster, or look at it with --dry-run")
    job.folder.mkdir(parents=True)
    snapshot.write(job.code, environment)
    job.config.write_text(config, encoding="utf-8")
    job.script.write_text(script, encoding="utf-8")
    done = subprocess.run(["sbatch", "--parsable", str(job.script)], capture_output=True, text=True, check=False)
    if done.returncode or not (match := SUBMITTED.fullmatch(done.stdout)):
        said = " ".join((done.stderr or done.stdout).split())
        raise ValueError(f"sbatch refused the job: {said}; its script is {job.script}")
    return match[1]
