"""Coordinate check: how large activations become, and how far updates move them, in models of several sizes.

A parametrisation carries hyperparameters from a small model to a large one if neither depends on the size (Yang et al.,
arXiv 2203.03466, appendix D). Everything is measured on one fixed batch of random tokens.
Shape suffixes: B batch, T sequence.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from models.config import LayerConfig, LMConfig
from models.plugin import Plugin
from models.state import Result
from parallel.engine import Batch, Engine
from parallel.mesh import Mesh
from trainer.optim.base import OptimConfig

# What is measured: outputs of mixers and FFNs (the mean over layers), the stream before the last norm, the logits.
PARTS = ("mixer", "ffn", "stream", "logits")
ROWS, LENGTH = 2, 8


@dataclasses.dataclass(frozen=True)
class Point:
    """One part of one model after `step` updates. size: mean |x|. change: mean |x - x before the first update|."""

    width: int
    layers: int
    step: int
    part: str
    size: float
    change: float


def sized(config: LMConfig, width: int | None = None, layers: int | None = None) -> LMConfig:
    """The same architecture of another width or depth: what plug-ins declare to grow does, and the pattern repeats.

    Raises ValueError where a number would not be whole.
    """
    if layers is not None:
        if layers % len(config.pattern):
            raise ValueError(
                f"{layers} layers are no whole number of patterns {config.pattern!r}; use multiples of "
                f"{len(config.pattern)}"
            )
        config = dataclasses.replace(config, repeat=layers // len(config.pattern))
    if width is None:
        return config

    def grown(plugin: Any) -> Any:
        names = [name for name in plugin.grows if getattr(plugin, name, None)]
        return dataclasses.replace(plugin, **{name: share(plugin, name, width, config.d_model) for name in names})

    own = {
        letter: LayerConfig(grown(layer.mixer), grown(layer.ffn), layer.norm) for letter, layer in config.layers.items()
    }
    return dataclasses.replace(config, d_model=width, layers=own)


def share(plugin: Plugin, name: str, width: int, base: int) -> int:
    """A field in proportion to the width."""
    value, rest = divmod(getattr(plugin, name) * width, base)
    if rest or not value:
        raise ValueError(
            f"{plugin.slot} {plugin.kind} has {name} {getattr(plugin, name)} at d_model {base}, which at {width} is no "
            "whole number; use another width"
        )
    return value


def measure(
    config: LMConfig, optim: OptimConfig, steps: int, seed: int, told: Callable[[], None] = lambda: None
) -> Iterator[Point]:
    """Train one model for some steps at the full learning rate. told: called after each forward pass."""
    mesh = Mesh.single("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(config, mesh, seed=seed, dtype=torch.float32)
    optimizer, generator = optim.build(engine), torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (ROWS, LENGTH + 1), generator=generator).to(mesh.device)
    first: dict[str, list[Tensor]] = {}
    for step in range(steps + 1):
        found = activations(engine, tokens[:, :-1])
        for part, now in found.items():
            before = first.setdefault(part, now)
            size = sum(float(x.abs().mean()) for x in now) / len(now)
            change = sum(float((x - y).abs().mean()) for x, y in zip(now, before, strict=True)) / len(now)
            yield Point(config.d_model, len(config.expanded), step, part, size, change)
        told()
        if step < steps:
            optimizer.begin(optim.lr)
            engine.step_gradients(Batch(tokens[:, :-1], tokens[:, 1:]), 1)
            if optim.clip is not None:
                engine.clip(optim.clip, engine.grad_norm())
            optimizer.step(optim.lr)


@torch.no_grad()
def activations(engine: Engine, tokens_BT: Tensor) -> dict[str, list[Tensor]]:
    """Of every part, a tensor for each place where it is."""
    (model,) = engine.models
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    hooks = []
    for layer in model.blocks:
        for part, sublayer in (("mixer", layer.mixer), ("ffn", layer.ffn)):

            def keep(module: Any, args: Any, out: Result, part: str = part) -> None:
                found[part].append(out.out_BTD)

            hooks.append(sublayer.branch.register_forward_hook(keep))
    assert model.closer is not None

    def keep_stream(module: Any, args: Any, out: Tensor) -> None:
        found["stream"].append(out)

    hooks.append(model.closer.register_forward_hook(keep_stream))
    try:
        logits = model(tokens_BT).logits
    finally:
        for hook in hooks:
            hook.remove()
    found["logits"].append(logits)
    return found


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of log value against log size, by least squares: the power of the size that the value grows with."""
    x = [math.log(size) for size in sizes]
    y = [math.log(max(value, 1e-30)) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / over


def slopes(points: Sequence[Point], along: str, step: int, what: str = "change") -> dict[str, float]:
    """By part: the power of `along` (width or layers) that size or change grows with, after `step` updates."""
    found = {}
    for part in PARTS:
        own = [point for point in points if point.part == part and point.step == step]
        found[part] = slope([getattr(p, along) for p in own], [getattr(p, what) for p in own])
    return found
