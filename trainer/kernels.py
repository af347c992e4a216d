"""Which implementation of its operations a run calls."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from models.config import LMConfig
from models.kernels.attention import Softmax
from models.kernels.op import AUTO, EVERY, Choice, Wanted, asked, choices, ops_of
from models.lm import LM
from parallel.context import goes_round
from parallel.mesh import MeshConfig

if TYPE_CHECKING:
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


def choose(config: "RunConfig", models: Iterable[LM], device: str) -> dict[str, Choice]:
    """Choose as the run asks, and have all operations of these models, which may be stages of its own, called so.

    Raises ValueError for what cannot be called there.
    """
    dtype = getattr(torch, config.train.dtype)
    by_name = chosen(config.model, config.kernels, torch.device(device), dtype, config.mesh)
    for model in models:
        for name, ops in ops_of(model).items():
            for op in ops:
                if by_name[name].implementation != RING:
                    op.choose(by_name[name].implementation)
    return by_name


def line(by_name: Mapping[str, Choice]) -> str | None:
    """One line that says what is called, and what is not because it cannot be."""
    if not by_name:
        return None
    return f"kernels: {', '.join(f'{name} {described(choice)}' for name, choice in by_name.items())}"


def described(choice: Choice) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over)
    return f"{choice.implementation} ({reasons})" if reasons else choice.implementation
