"""Which implementation of its operations a run calls."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from models.config import LMConfig
from models.kernels.attention import Softmax
from models.kernels.op import AUTO, EVERY, Choice, Wanted, asked, choices, ops_of
from models.lm import LM
from parallel.context import goes_round
from parallel.mesh import MeshConfig

if TYPE_CHECKING:
    from parallel.engine import Engine
    from trainer.config import RunConfig


RING = "ring"  # attention's, of ranks that pass keys and values on


def chosen(
    model: LMConfig, wanted: Wanted, device: torch.device, dtype: torch.dtype, mesh: MeshConfig | None = None
) -> dict[str, Choice]:
    """By the name of each operation that the model has. Raises ValueError for what cannot be called, or is not one."""
    with torch.device("meta"):
        whole = LM(model)
    by_name = choices(whole, wanted, device, dtype)
    if mesh is not None and goes_round(whole, mesh):
        refuse_beside_ring(wanted)
        by_name[Softmax.name] = Choice(RING)
    return by_name


def refuse(model: LMConfig, wanted: Wanted, mesh: MeshConfig) -> None:
    """Raise ValueError for an operation or an implementation that there is not. Where it runs is known later."""
    with torch.device("meta"):
        whole = LM(model)
    asked(whole, wanted)
    if goes_round(whole, mesh):
        refuse_beside_ring(wanted)


def refuse_beside_ring(wanted: Wanted) -> None:
    """Raise ValueError for an attention that is asked for where a ring has its own."""
    by_name = {EVERY: wanted} if isinstance(wanted, str) else wanted
    every = by_name.get(EVERY, AUTO)
    own = by_name.get(Softmax.name, every if every in Softmax.implementations else AUTO)
    if own != AUTO:
        raise ValueError(
            f"kernels.{Softmax.name} is {own}, and with mesh.context ring keys and values go round by an attention of "
            f"its own; use {AUTO}, or mesh.context ulysses"
        )


def choose(config: "RunConfig", engine: "Engine", wanted: Wanted | None = None) -> dict[str, Choice]:
    """Choose as the run asks, or is `wanted`, and have all operations of the engine's model called so.

    Raises ValueError for what cannot be called there.
    """
    mesh, dtype = engine.mesh, getattr(torch, config.train.dtype)
    asked_for = config.kernels if wanted is None else wanted
    by_name = chosen(engine.config, asked_for, torch.device(mesh.device), dtype, mesh.config)
    for model in engine.models:
        for name, ops in ops_of(model).items():
            for op in ops:
                if by_name[name].implementation != RING:
                    op.choose(by_name[name].implementation)
    return by_name


def choose_again(config: "RunConfig", engine: "Engine", warn: Callable[[str], object]) -> None:
    """Choose for what a run trained, perhaps elsewhere: where what it asked for cannot be called, by `auto`, and warn
    of that."""
    try:
        choose(config, engine)
    except ValueError as error:
        warn(f"{error}: {AUTO} is taken here")
        choose(config, engine, AUTO)


def line(by_name: Mapping[str, Choice]) -> str | None:
    """One line that says what is called, and what is not because it cannot be."""
    if not by_name:
        return None
    return f"kernels: {', '.join(f'{name} {described(choice)}' for name, choice in by_name.items())}"


def described(choice: Choice) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over)
    return f"{choice.implementation} ({reasons})" if reasons else choice.implementation
