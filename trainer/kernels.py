"""Which implementation of its operations a run calls."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from models.config import LMConfig
from models.kernels.op import Choice, Wanted, asked, choices, ops_of
from models.lm import LM

if TYPE_CHECKING:
    from trainer.config import RunConfig


def chosen(model: LMConfig, wanted: Wanted, device: torch.device, dtype: torch.dtype) -> dict[str, Choice]:
    """By the name of each operation that the model has. Raises ValueError for what cannot be called, or is not one."""
    with torch.device("meta"):
        return choices(LM(model), wanted, device, dtype)


def refuse(model: LMConfig, wanted: Wanted) -> None:
    """Raise ValueError for an operation or an implementation that there is not. Where it runs is known later."""
    with torch.device("meta"):
        asked(LM(model), wanted)


def choose(config: "RunConfig", models: Iterable[LM], device: str) -> dict[str, Choice]:
    """Choose as the run asks, and have all operations of these models, which may be stages of its own, called so.

    Raises ValueError for what cannot be called there.
    """
    by_name = chosen(config.model, config.kernels, torch.device(device), getattr(torch, config.train.dtype))
    for model in models:
        for name, ops in ops_of(model).items():
            for op in ops:
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
