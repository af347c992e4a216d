"""How many processes a run takes, on how many machines, and how they are stopped."""

import argparse
import dataclasses
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallel.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a run, as seen from one of its machines.

    nproc: on each machine. nodes: machines. endpoint: host:port of the first machine, by which they find one another.
    id: a name for this launch, the same on all machines. max_restarts: how often all processes start again after one
    has failed. shutdown_timeout: seconds that they get to save and end once they are asked to.
    """

    nproc: int
    nodes: int = 1
    endpoint: str = "localhost:0"
    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    max_restarts: int = 0
    shutdown_timeout: float = 600

    @property
    def alone(self) -> bool:
        """Whether one process does it, without an agent that watches over it."""
        return self.nodes == self.nproc == 1 and not self.max_restarts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `group` reads."""
    parser.add_argument("--nproc", metavar="N", type=int, help="processes of each machine (default: as the mesh needs)")
    parser.add_argument("--nodes", metavar="N", type=int, default=1, help="machines (default: %(default)s)")
    parser.add_argument("--max-restarts", metavar="N", type=int, default=0, help="after a failure (default: 0)")
    words = "to save and end in, once told to stop (default: %(default)g)"
    parser.add_argument("--shutdown-timeout", metavar="SECONDS", type=float, default=600, help=words)
    words = "the first machine's, where --nodes is started by hand on each"
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help=words)
    parser.add_argument("--rdzv-id", metavar="NAME", default="weft", help="the same on each machine")


def processes(args: argparse.Namespace, mesh: "MeshConfig") -> int:
    """Processes of each machine. Raises ValueError where they do not make up the mesh."""
    for option, least in (("nodes", 1), ("nproc", 1), ("max_restarts", 0), ("shutdown_timeout", 0)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; it must be at least {least}")
    size, started = mesh.world_size, args.nodes * (args.nproc or 1)
    if args.nproc is None and size % args.nodes:
        raise ValueError(
            f"--nodes {args.nodes} cannot share the {size} processes of the mesh {mesh}; use a number that divides "
            f"{size}, or a mesh of a multiple of {args.nodes} processes"
        )
    if args.nproc is not None and started != size:
        nodes = f"--nodes {args.nodes} x " if args.nodes > 1 else ""
        raise ValueError(
            f"{nodes}--nproc {args.nproc} makes {started} processes and the mesh {mesh} takes {size}; leave --nproc "
            f"out, or give a mesh of {started} processes"
        )
    return args.nproc or size // args.nodes


def group(args: argparse.Namespace, mesh: "MeshConfig") -> Group:
    """Raises ValueError for what cannot be started from here."""
    nproc = processes(args, mesh)
    if args.nodes == 1:
        return Group(nproc, max_restarts=args.max_restarts, shutdown_timeout=args.shutdown_timeout)
    if args.rdzv_endpoint is None:
        raise ValueError(
            f"--nodes {args.nodes} needs --slurm, which starts them all, or --rdzv-endpoint HOST:PORT of the first "
            "machine, with the same command on each"
        )
    host, _, port = args.rdzv_endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--rdzv-endpoint is {args.rdzv_endpoint!r}; write HOST:PORT, such as node1:29500")
    return Group(nproc, args.nodes, args.rdzv_endpoint, args.rdzv_id, args.max_restarts, args.shutdown_timeout)
