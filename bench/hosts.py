"""Hosts on one machine: network namespaces, each with a name, at the ends of one cable. They take root, and `ip`."""

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launch.local import ROOT, environment

ETC = Path("/etc/netns")


class Hosts:
    """Two hosts, of which the first has the address 10.77.0.1. Names are unique: several tests may run at once."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:8]
        self.names = [f"weft-{tag}-{end}" for end in "ab"]
        self.links = [f"wf{tag}{end}" for end in "ab"]
        self.address = "10.77.0.1"
        self._started: list[subprocess.Popen[str]] = []

    def make(self) -> None:
        """Raises CalledProcessError where that is not allowed here."""
        for name in self.names:
            ip("netns", "add", name)
            # What stands there replaces the file in /etc. torchrun asks for the host's own name.
            (ETC / name).mkdir(parents=True)
            (ETC / name / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 a\n10.77.0.2 b\n")
            ip("-n", name, "link", "set", "lo", "up")
        (a, b), (link_a, link_b) = self.names, self.links
        ip("link", "add", link_a, "netns", a, "type", "veth", "peer", "name", link_b, "netns", b)
        for host, (name, link) in enumerate(zip(self.names, self.links, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{host}/30", "dev", link)
            ip("-n", name, "link", "set", link, "up")

    def start(
        self, host: int, command: Sequence[str], own: Mapping[str, str] = MappingProxyType({}), **outputs: Any
    ) -> subprocess.Popen[str]:
        """Run a command on a host, which is called `a` or `b`. own: environment variables. outputs: stdout and stderr,
        as of `subprocess`."""
        name = f'hostname {"ab"[host]} && exec "$@"'
        where = ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "sh", "-c", name, "sh"]
        env = {**environment(os.environ), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.links[host], **own}
        process = subprocess.Popen([*where, *command], env=env, cwd=ROOT, text=True, **outputs)
        self._started.append(process)
        return process

    def processes(self, host: int) -> list[int]:
        return list(map(int, ip("netns", "pids", self.names[host]).split()))

    def kill(self, host: int) -> None:
        """End all processes of a host at once, as a loss of power does."""
        for pid in self.processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def cut(self, host: int) -> None:
        """Take the cable out: nobody is told."""
        ip("-n", self.names[host], "link", "set", self.links[host], "down")

    def mend(self, host: int) -> None:
        ip("-n", self.names[host], "link", "set", self.links[host], "up")

    def remove(self) -> None:
        for host, name in enumerate(self.names):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill(host)
                ip("netns", "del", name)
            shutil.rmtree(ETC / name, ignore_errors=True)
        for process in self._started:
            process.kill()
            process.wait(30)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


class NoHosts(Exception):
    """Why there can be none here, in a sentence."""


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Raises NoHosts."""
    if (
        os.geteuid()
        or not all(map(shutil.which, ("ip", "unshare", "hostname")))
        or not Path("/proc/self/ns/net").exists()
    ):
        raise NoHosts("network namespaces take root and the tools ip, unshare and hostname")
    hosts = Hosts()
    try:
        try:
            hosts.make()
        except subprocess.CalledProcessError as error:
            raise NoHosts(f"no network namespaces here: {error.stderr.strip()}") from error
        yield hosts
    finally:
        hosts.remove()
