"""Time of a step under tensor parallelism whose collectives are slow, plain beside ladder: `python -m bench.ladder`.

    python -m bench.ladder --tp 2,4 --latency 0,1,2,4,8 --plot docs/images/ladder.svg
    torchrun --nnodes 2 --nproc-per-node 1 ... -m bench.ladder --latency 0      # over a real network, tp = its ranks

On one machine a collective's end is held back: by so many milliseconds for a gather or a reduce-scatter, by twice as
many for an all-reduce, which is both. The plain residual waits for each at once; the ladder, with `overlap=true` in
the mesh, computes the next branch meanwhile. A step is a forward and a backward pass. hidden: of the time that the
ladder's collectives were held back, the share by which its step did not become longer; a part of it, ends, is at the
embedding and in the loss, which have no branch beside them. ideal: the ladder where nothing is held back. The sides
take turns.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console

from configs.structure import instantiate
from models.config import LMConfig
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from trainer.process import joined
from trainer.progress import counting

# By what is sent, in halves of an all-reduce. Torch 2.13 renames two of them.
HALVES = {
    "all_gather": 1,
    "all_gather_single": 1,
    "all_gather_into_tensor": 1,
    "reduce_scatter_single": 1,
    "reduce_scatter_tensor": 1,
    "all_reduce": 2,
}
SIDES = ("plain", "ladder")

Row = dict[str, Any]


class Late:
    """A collective's work that is done no sooner than `ready`."""

    def __init__(self, work: Any, ready: float) -> None:
        self.work, self.ready = work, ready

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.ready - time.perf_counter()))


class Link:
    """Holds collectives back by `latency` seconds a half, and adds up by how much; at_once: of those waited for where
    they begin."""

    def __init__(self, latency: float) -> None:
        self.latency, self.held_back, self.at_once = latency, 0.0, 0.0

    def slowed(self, collective: Callable[..., Any], halves: int) -> Callable[..., Any]:
        def run(*args: Any, async_op: bool = False, **rest: Any) -> Any:
            began, delay = time.perf_counter(), halves * self.latency
            work = collective(*args, async_op=async_op, **rest)
            self.held_back += delay
            if async_op:
                return Late(work, began + delay)
            self.at_once += delay
            time.sleep(delay)
            return work

        return run

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, halves in HALVES.items():
                if hasattr(dist, name):
                    stack.enter_context(mock.patch.object(dist, name, self.slowed(getattr(dist, name), halves)))
            yield


def model(residual: str, width: int, layers: int) -> LMConfig:
    letter = {
        "mixer": {"kind": "attention", "num_heads": 8, "num_kv_heads": 4},
        "ffn": {"kind": "swiglu", "hidden": 3 * width},
    }
    data = {"vocab_size": 256, "d_model": width, "pattern": "A", "repeat": layers, "layers": {"A": letter}}
    return instantiate(LMConfig, {**data, "residual": {"kind": residual}})


def measured(tp: int, latencies: list[float], rounds: int, sizes: tuple[int, int, int]) -> list[Row]:
    """This rank's rows. sizes: width, layers, tokens."""
    torch.set_num_threads(1)
    width, layers, length = sizes
    tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
    engines = {
        side: Engine(model(side, width, layers), Mesh(MeshConfig(tp=tp, overlap=side == "ladder")), seed=0)
        for side in SIDES
    }
    times: dict[tuple[str, float], list[float]] = {}
    held: dict[tuple[str, float], Link] = {}
    for turn in range(rounds + 1):
        for latency in dict.fromkeys((0.0, *latencies)):
            for side, engine in engines.items():
                link = Link(latency)
                dist.barrier()
                with link.used():
                    began = time.perf_counter()
                    out = engine.forward({"tokens": tokens, "targets": tokens})
                    assert out.loss is not None
                    out.loss.backward()
                    seconds = time.perf_counter() - began
                if turn:
                    times.setdefault((side, latency), []).append(seconds)
                held[side, latency] = link
    step = {at: statistics.median(found) for at, found in times.items()}
    return [
        {
            "tp": tp,
            "latency_ms": 1000 * latency,
            "plain_s": step["plain", latency],
            "ladder_s": step["ladder", latency],
            "ideal_s": step["ladder", 0.0],
            "ladder_held_back_s": held["ladder", latency].held_back,
            "ends_held_back_s": held["ladder", latency].at_once,
            "hidden": hidden(step["ladder", latency] - step["ladder", 0.0], held["ladder", latency].held_back),
        }
        for latency in latencies
    ]


def hidden(longer: float, held_back: float) -> float | None:
    return 1 - longer / held_back if held_back else None


def here(tps: list[int], latencies: list[float], rounds: int, sizes: tuple[int, int, int]) -> list[Row]:
    """On processes of this machine."""
    found: list[Row] = []
    with Pool(max(tps)) as pool, counting(Console(stderr=True), "degrees", len(tps)) as advance:
        for tp in tps:
            found += pool.run(measured, tp, tp, latencies, rounds, sizes, timeout=3600)[0]
            advance(1)
    return found


def plot(found: list[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    degrees = list(dict.fromkeys(row["tp"] for row in found))
    figure, panes = pyplot.subplots(1, len(degrees), figsize=(4.5 * len(degrees), 3.4), layout="constrained")
    for tp, pane in zip(degrees, panes if len(degrees) > 1 else [panes], strict=True):
        own = [row for row in found if row["tp"] == tp]
        for side in ("plain", "ladder", "ideal"):
            times = [1000 * row[f"{side}_s"] for row in own]
            pane.plot([row["latency_ms"] for row in own], times, marker="o", label=side)
        pane.set(title=f"tp={tp}", xlabel="a gather takes, ms more", ylabel="a step, ms", ylim=(0, None))
        pane.legend()
    figure.savefig(file)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", default="2,4", help="degrees, where torchrun gives none (default: %(default)s)")
    parser.add_argument("--latency", default="0,1,2,4,8", metavar="MS", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--sizes", default="512,16,512", help="width, layers, tokens (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them")
    args = parser.parse_args()
    latencies = [float(x) / 1000 for x in args.latency.split(",")]
    width, layers, length = (int(x) for x in args.sizes.split(","))
    sizes = width, layers, length
    if "WORLD_SIZE" in os.environ:
        tp = int(os.environ["WORLD_SIZE"])
        with joined(MeshConfig(tp=tp)):
            found = measured(tp, latencies, args.rounds, sizes)
        if os.environ["RANK"] != "0":
            return 0
    else:
        found = here([int(x) for x in args.tp.split(",")], latencies, args.rounds, sizes)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for row in found:
            whole, ends, share = row["ladder_held_back_s"], row["ends_held_back_s"], ""
            if row["hidden"] is not None:
                share = f", {row['hidden']:.0%} of {whole:.3f} s hidden (ends {ends:.3f} s)"
            share = (
                "" if row["hidden"] is None else f", {row['hidden']:.0%} of {whole:.3f} s hidden (ends {ends:.3f} s)"
            )
            print(
                f"tp={row['tp']}, {row['latency_ms']:4.1f} ms: plain {row['plain_s']:.3f} s, ladder "
                f"{row['ladder_s']:.3f} s, ideal {row['ideal_s']:.3f} s{share}"
            )
    if args.plot:
        plot(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
