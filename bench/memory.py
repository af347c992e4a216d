"""Activation memory and time of a step against depth, for every kind of `memory`: `python -m bench.memory`.

    python -m bench.memory --json                       # a JSON row per depth and kind
    python -m bench.memory --plot docs/images/memory.svg

One model for all: a reversible residual on its grid, attention and SwiGLU, float32. activation_bytes is the most that
was alive at once during a step, of what the step itself allocated for tensors: every storage is counted from the
operator that makes it until it is freed, gradients of parameters left out. kept_bytes is what of it was alive between
the forward and the backward pass. What waits in host memory is not counted, though here it is the same memory.
The kinds take turns within a depth.
"""

import argparse
import json
import statistics
import sys
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.structure import instantiate
from models.config import MOST_LAYERS, LMConfig
from models.lm import LM
from models.memory.base import MemoryConfig
from models.memory.host import Host
from models.memory.sizes import storage
from models.params import initialize
from trainer.progress import counting

WIDTH, LENGTH, BATCH = 64, 128, 2
# Time over none's. One more forward pass is a third of a step's FLOPs; what the paper on stretches saw.
PUBLISHED = {
    "full": "1.33 by FLOPs: one more forward pass",
    "sqrt": "1.30 measured (arXiv 1604.06174)",
    "reversible": "1.33 by FLOPs: one more forward pass",
    "pareprop": "up to 1.2 times reversible's speed on a GPU (arXiv 2306.09342)",
}

# Tensors of a model of this width are small.
MODES: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "selective": {"kind": "selective"},
    "full": {"kind": "full"},
    "sqrt": {"kind": "sqrt"},
    "offload": {"kind": "offload", "min_bytes": 1024},
    "offload_full": {"kind": "offload", "min_bytes": 1024, "of": {"kind": "full"}},
    "reversible": {"kind": "reversible"},
    "pareprop": {"kind": "pareprop"},
}

Row = dict[str, Any]


class Alive(TorchDispatchMode):
    """Bytes of the storages that operators made within it and that are still there, and the most there were."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = {storage(x) for x in known}
        self._aside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and not x.is_meta and storage(x) not in self._seen:
                self._add(x.untyped_storage())
        return made

    def out(self, x: Tensor) -> Tensor:
        """What waits in host memory for x."""
        self._aside = True
        waiting = x.clone()
        self._aside = False
        return waiting

    def _add(self, found: torch.UntypedStorage) -> None:
        key, size = found._cdata, 0 if self._aside else found.nbytes()
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(found, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def model(layers: int) -> LM:
    letter = {"mixer": {"kind": "attention", "num_heads": 4}, "ffn": {"kind": "swiglu", "hidden": 3 * WIDTH}}
    data = {"vocab_size": 256, "d_model": WIDTH, "pattern": "A", "repeat": layers, "layers": {"A": letter}}
    config = instantiate(LMConfig, {**data, "residual": {"kind": "reversible", "grid_bits": 14}})
    built = LM(config)
    initialize(built, 0)
    return built


def loss_of(built: LM, tokens_BT: Tensor) -> Tensor:
    out = built(tokens_BT[:, :-1], tokens_BT[:, 1:])
    assert out.loss is not None
    return out.loss


def measured(built: LM) -> tuple[int, int]:
    """(most bytes of a step, bytes between its passes)."""
    tokens_BT = torch.randint(256, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    for parameter in built.parameters():
        parameter.grad = torch.zeros_like(parameter)
    own = [x for p in built.parameters() for x in (p, p.grad) if x is not None]
    alive = Alive([*own, tokens_BT])
    with alive, mock.patch.object(Host, "out", lambda _, x: alive.out(x)):
        loss = loss_of(built, tokens_BT)
        kept = alive.now
        loss.backward()
    return alive.most, kept


def seconds(built: LM) -> float:
    """Of a step, without the optimiser."""
    tokens_BT = torch.randint(256, (BATCH, LENGTH + 1))
    began = time.perf_counter()
    loss_of(built, tokens_BT).backward()
    return time.perf_counter() - began


def rows(layers: int, kinds: list[str], rounds: int) -> list[Row]:
    built, found, times = model(layers), [], {kind: [] for kind in kinds}
    modes = {kind: instantiate(MemoryConfig, MODES[kind]) for kind in kinds}
    for kind, mode in modes.items():
        mode.apply(built)
        most, kept = measured(built)
        found.append({"layers": layers, "memory": kind, "activation_bytes": most, "kept_bytes": kept})
    for _ in range(rounds):
        for kind, mode in modes.items():
            mode.apply(built)
            seconds(built)
            times[kind].append(seconds(built))
    for row in found:
        row["step_s"] = statistics.median(times[row["memory"]])
    return found


def plot(found: list[Row], file: Path) -> None:
    """Bytes, and time over that of keeping all, against depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, clock) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    base = {row["layers"]: row["step_s"] for row in found if row["memory"] == "none"}
    for kind in dict.fromkeys(row["memory"] for row in found):
        own = [row for row in found if row["memory"] == kind]
        depths = [row["layers"] for row in own]
        memory.plot(depths, [row["activation_bytes"] / 2**20 for row in own], marker="o", label=kind)
        clock.plot(depths, [row["step_s"] / base[row["layers"]] for row in own], marker="o", label=kind)
    memory.set(xlabel="layers", ylabel="activations, MiB", xscale="log", yscale="log")
    clock.set(xlabel="layers", ylabel="time of a step / that of none", xscale="log", ylim=(0.9, None))
    memory.legend()
    figure.savefig(file)
    pyplot.close(figure)


def kind_names(text: str) -> list[str]:
    names = text.split(",")
    if wrong := [name for name in names if name not in MODES]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(MODES)}")
    return list(dict.fromkeys(names))


def depth_numbers(text: str) -> list[int]:
    """In order, each once."""
    return sorted({positive(part) for part in text.split(",")})


def positive(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= MOST_LAYERS:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MOST_LAYERS}")
    return int(text)


def report(found: list[Row], kinds: list[str], depths: list[int]) -> None:
    base = {row["layers"]: row["step_s"] for row in found if row["memory"] == "none"}
    for row in found:
        ratio = f", {row['step_s'] / base[row['layers']]:.2f} of none's" if base else ""
        print(
            f"{row['layers']:4} layers  {row['memory']:12} {row['activation_bytes'] / 2**20:8.2f} MiB, between "
            f"passes {row['kept_bytes'] / 2**20:8.2f} MiB, {row['step_s']:.3f} s{ratio}"
        )
    for kind in kinds:
        own = [row for row in found if row["memory"] == kind]
        if len(depths) > 1:
            growth = (own[-1]["activation_bytes"] - own[0]["activation_bytes"]) / (depths[-1] - depths[0])
            print(f"{kind:12} {growth / 1024:10.1f} KiB per layer")
    for kind in kinds if base else ():
        ratios = [row["step_s"] / base[row["layers"]] for row in found if row["memory"] == kind]
        published = f"; published: {PUBLISHED[kind]}" if kind in PUBLISHED else ""
        print(f"{kind:12} {statistics.median(ratios):10.2f} of none's time, the median of the depths{published}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=depth_numbers, default="4,8,16,32,64,128", help="default: %(default)s")
    parser.add_argument("--memory", type=kind_names, default=",".join(MODES), help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=5, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them")
    args = parser.parse_args()
    depths, kinds = args.layers, args.memory
    if args.plot and not args.plot.parent.is_dir():
        parser.error(f"argument --plot: there is no folder {args.plot.parent}")
    if args.plot and "none" not in kinds:
        parser.error("--plot draws times over those of none; add none to --memory")
    found: list[Row] = []
    with counting(Console(stderr=True), "depths", len(depths)) as advance:
        for layers in depths:
            found += rows(layers, kinds, args.rounds)
            advance(1)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        report(found, kinds, depths)
    if args.plot:
        plot(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
