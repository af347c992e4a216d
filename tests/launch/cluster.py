"""A Slurm cluster of two nodes on this machine: munged, slurmctld, two slurmd; own folder and ports.

It runs as whoever runs the tests. Nothing of the system's own Slurm is read or changed.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
PACKAGES = ("slurm-wlm", "munge")
NODES = ("node1", "node2")


def missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def install() -> str:
    """Install Debian's packages where that is possible; returns why it was not, or nothing."""
    if not missing():
        return ""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{', '.join(missing())} not installed, and only root with apt-get can"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", *command], env=environment, capture_output=True, text=True, timeout=200, check=False
        )
    if missing():
        return f"apt-get install {' '.join(PACKAGES)} failed: {' '.join(done.stderr.split())[-300:]}"
    return ""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def configuration(folder: Path) -> str:
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    controller, *ports = free_ports(1 + len(NODES))
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
        for name, port in zip(NODES, ports, strict=True)
    ]
    lines = [
        "ClusterName=weft",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        "AuthType=auth/munge",
        # Credentials that live shortly: a requeued job waits until those of its last start are void.
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool.%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd.%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "MpiDefault=none",
        "SwitchType=switch/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerType=sched/builtin",
        "SchedulerParameters=sched_interval=2",
        "ReturnToService=2",
        "SlurmdParameters=config_overrides",
        "KillWait=10",
        *nodes,
        f"PartitionName=debug Nodes={','.join(NODES)} Default=YES MaxTime=60:00 State=UP",
    ]
    return "\n".join(lines) + "\n"


class Cluster:
    """environment: in which Slurm's commands speak to this cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": f"{folder}/slurm.conf"}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        (self.folder / "slurm.conf").write_text(configuration(self.folder))
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.run("sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"], "the nodes")

    def _daemon(self, name: str, *arguments: str) -> None:
        log = (self.folder / f"{name}-{len(self._daemons)}.out").open("wb")
        with log:
            self._daemons.append(
                subprocess.Popen([name, *arguments], env=self.environment, stdout=log, stderr=log, cwd=self.folder)
            )

    def _until(self, condition: Callable[[], bool], what: str, within: float = 60) -> None:
        end = time.monotonic() + within
        while not condition():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self._daemons):
                raise RuntimeError(f"{what} did not come up:\n{self.logs()}")
            time.sleep(0.2)

    def run(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        pairs = [word.partition("=") for word in self.run("scontrol", "show", "job", number).split()]
        return {name: value for name, _, value in pairs}

    def logs(self) -> str:
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-4000:]}"
            for file in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        )

    def stop(self) -> None:
        """End all jobs, then the daemons, last started first."""
        if len(self._daemons) > 1:
            self.run("scancel", "--state=RUNNING,PENDING,SUSPENDED", f"--user={getpass.getuser()}")
            end = time.monotonic() + 30
            while self.run("squeue", "--noheader") and time.monotonic() < end:
                time.sleep(0.3)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    # Short, since the path of a socket holds about 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="weft-slurm-"))
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)
