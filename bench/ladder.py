"""Time of a step under tensor parallelism whose collectives are slow, plain beside ladder: `python -m bench.ladder`.

    python -m bench.ladder --tp 2,4 --latency 1,2,4,8 --plot docs/images/ladder.svg
    python -m bench.ladder --rate 4gbit,2gbit,1gbit      # takes root: two network namespaces, and tc tbf between them
    torchrun --nnodes 2 --nproc-per-node 1 ... -m bench.ladder --latency 0      # over a real network, tp = its ranks

--latency: on one machine a collective's end is held back, by so many milliseconds for a gather or a reduce-scatter, by
twice as many for an all-reduce, which is both. --rate: each of two hosts sends no faster. The plain residual waits for
each collective at once; the ladder, with `overlap=true` in the mesh, computes the next branch meanwhile. A step is a
forward and a backward pass. communication: what the ladder's collectives take by the latency or the rate alone; hidden:
the share of it by which the step did not become longer. Some of it, ends, is at the embedding and in the loss, which
have no branch beside them. ideal: the ladder without it. All take turns, and are compared within a turn.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from bench.hosts import Hosts, NoHosts, two_hosts
from bench.links import Latency, Link, Rate, Unlimited
from configs.structure import instantiate
from models.config import LMConfig
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from trainer.process import joined
from trainer.progress import counting

SIDES = ("plain", "ladder")

Row = dict[str, Any]


def model(residual: str, width: int, layers: int) -> LMConfig:
    letter = {
        "mixer": {"kind": "attention", "num_heads": 8, "num_kv_heads": 4},
        "ffn": {"kind": "swiglu", "hidden": 3 * width},
    }
    data = {"vocab_size": 256, "d_model": width, "pattern": "A", "repeat": layers, "layers": {"A": letter}}
    return instantiate(LMConfig, {**data, "residual": {"kind": residual}})


def measured(tp: int, links: list[Link], rounds: int, sizes: tuple[int, int, int]) -> list[Row]:
    """This rank's rows, one for each link but the first, which is the free one. sizes: width, layers, tokens."""
    torch.set_num_threads(1)
    width, layers, length = sizes
    tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
    engines = {
        side: Engine(model(side, width, layers), Mesh(MeshConfig(tp=tp, overlap=side == "ladder")), seed=0)
        for side in SIDES
    }
    times: dict[tuple[str, str], list[float]] = {(side, link.name): [] for side in SIDES for link in links}
    for turn in range(rounds + 1):
        for link in links:
            link.prepare()
            for side, engine in engines.items():
                link.seconds = link.at_once = 0.0
                dist.barrier()
                with link.used():
                    began = time.perf_counter()
                    out = engine.forward({"tokens": tokens, "targets": tokens})
                    assert out.loss is not None
                    out.loss.backward()
                    seconds = time.perf_counter() - began
                if turn:
                    times[side, link.name].append(seconds)
    free, *slow = links
    ideal = times["ladder", free.name]

    def row(link: Link) -> Row:
        plain, ladder = times["plain", link.name], times["ladder", link.name]
        longer = statistics.median(late - free for late, free in zip(ladder, ideal, strict=True))
        return {
            "tp": tp,
            "link": link.name,
            "plain_s": statistics.median(plain),
            "ladder_s": statistics.median(ladder),
            "ideal_s": statistics.median(ideal),
            # The ladder went last.
            "communication_s": link.seconds,
            "ends_s": link.at_once,
            "hidden": 1 - longer / link.seconds if link.seconds else None,
        }

    return [row(link) for link in slow]


def here(tps: list[int], links: list[Link], rounds: int, sizes: tuple[int, int, int]) -> list[Row]:
    """On processes of this machine."""
    found: list[Row] = []
    with Pool(max(tps)) as pool, counting(Console(stderr=True), "degrees", len(tps)) as advance:
        for tp in tps:
            found += pool.run(measured, tp, tp, links, rounds, sizes, timeout=3600)[0]
            advance(1)
    return found


def between(hosts: Hosts, given: list[str]) -> list[Row]:
    """On two hosts, by this same command with the arguments `given`."""
    command = [sys.executable, "-m", "bench.ladder", *given, "--json"]
    rendezvous = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": hosts.address, "MASTER_PORT": "29500"}
    first, second = [
        hosts.start(host, command, {**rendezvous, "RANK": str(host)}, stdout=subprocess.PIPE) for host in range(2)
    ]
    out, _ = first.communicate()
    if first.returncode or second.wait():
        raise NoHosts(f"the ranks ended with {first.returncode} and {second.wait()}, having said: {out}")
    return json.loads(out)


def plot(found: list[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    degrees = list(dict.fromkeys(row["tp"] for row in found))
    figure, panes = pyplot.subplots(1, len(degrees), figsize=(4.5 * len(degrees), 3.4), layout="constrained")
    for tp, pane in zip(degrees, panes if len(degrees) > 1 else [panes], strict=True):
        own = [row for row in found if row["tp"] == tp]
        for side in ("plain", "ladder", "ideal"):
            pane.plot([row["link"] for row in own], [1000 * row[f"{side}_s"] for row in own], marker="o", label=side)
        label = "a sender's rate" if own[0]["link"].endswith("bit") else "a gather takes longer by"
        pane.set(title=f"tp={tp}", xlabel=label, ylabel="a step, ms", ylim=(0, None))
        pane.legend()
    figure.savefig(file)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", default="2,4", help="degrees, where torchrun gives none (default: %(default)s)")
    slow = parser.add_mutually_exclusive_group()
    slow.add_argument("--latency", default="1,2,4,8", metavar="MS", help="default: %(default)s")
    slow.add_argument("--rate", metavar="RATE", help="between two hosts made for this, such as 1gbit,500mbit")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--sizes", default="512,16,512", help="width, layers, tokens (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them")
    args = parser.parse_args()
    width, layers, length = (int(x) for x in args.sizes.split(","))
    sizes = width, layers, length
    device = os.environ.get("GLOO_SOCKET_IFNAME", "")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which leaves no hosts behind
    try:
        links: list[Link] = [Link(), *(Latency(float(x)) for x in args.latency.split(","))]
        if args.rate:
            links = [Unlimited(device), *(Rate(x, device) for x in args.rate.split(","))]
        if "WORLD_SIZE" in os.environ:
            tp = int(os.environ["WORLD_SIZE"])
            with joined(MeshConfig(tp=tp)):
                found = measured(tp, links, args.rounds, sizes)
            if os.environ["RANK"] != "0":
                return 0
        elif args.rate:
            with two_hosts() as hosts:
                found = between(hosts, ["--rate", args.rate, "--rounds", str(args.rounds), "--sizes", args.sizes])
        else:
            found = here([int(x) for x in args.tp.split(",")], links, args.rounds, sizes)
    except (ValueError, NoHosts) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for row in found:
            share = "" if row["hidden"] is None else f", {row['hidden']:.0%} hidden"
            seconds = ", ".join(f"{name} {row[name + '_s']:.3f} s" for name in ("plain", "ladder", "ideal"))
            taken = f"communication {row['communication_s']:.3f} s (ends {row['ends_s']:.3f} s)"
            print(f"tp={row['tp']}, {row['link']}: {seconds}, {taken}{share}")
    if args.plot:
        plot(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
