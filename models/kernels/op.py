"""Operations with several implementations, and how a run chooses among them.

A module that needs one holds it as a part. As built it is the reference; a run chooses once, before the first step,
says which, and nothing falls back later.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

AUTO, REFERENCE, TRITON = "auto", "reference", "triton"
EVERY = "default"  # in a config: of all operations that it does not name

Wanted = str | Mapping[str, str]  # of all operations, or by the name of each


class Choice(NamedTuple):
    """implementation: what is called. passed_over: those that would have been before it, and why they are not."""

    implementation: str
    passed_over: tuple[tuple[str, str], ...] = ()


class Op(nn.Module):
    """name: in configs. reference: in plain torch. others: the module of every other implementation, a function called
    as the operation is. They are imported when they are chosen, since what they need may not be installed."""

    name: ClassVar[str]
    reference: ClassVar[Callable[..., Any]]
    others: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self) -> None:
        super().__init__()
        self.call = type(self).reference

    def forward(self, *args: Any) -> Any:
        return self.call(*args)

    @property
    def known(self) -> tuple[str, ...]:
        return (AUTO, *self.others, REFERENCE)

    def order(self, device: torch.device) -> tuple[str, ...]:
        """Those that `auto` tries, fastest first; the last one takes anything."""
        return (*self.others, REFERENCE) if device.type == "cuda" else (REFERENCE,)

    def refusal(self, implementation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot be called there, None where it can."""
        return without_triton(device) if implementation == TRITON else None

    def choice(self, wanted: str, device: torch.device, dtype: torch.dtype) -> Choice:
        """Raises ValueError for one that there is not, or that cannot be called there."""
        if wanted not in self.known:
            raise ValueError(f"kernels.{self.name} is {wanted!r}; use one of {', '.join(self.known)}")
        if wanted != AUTO:
            if reason := self.refusal(wanted, device, dtype):
                raise ValueError(f"kernels.{self.name} is {wanted}, and {reason}; use {AUTO} or {REFERENCE}")
            return Choice(wanted)
        passed_over: list[tuple[str, str]] = []
        for implementation in self.order(device):
            reason = self.refusal(implementation, device, dtype)
            if reason is None:
                return Choice(implementation, tuple(passed_over))
            passed_over.append((implementation, reason))
        raise AssertionError("the last one takes anything")

    def choose(self, implementation: str) -> None:
        """Call this one from now on."""
        self.call = type(self).reference
        if implementation != REFERENCE:
            self.call = getattr(importlib.import_module(self.others[implementation]), self.name)


def without_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'weft[triton]')"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton's kernels need a GPU, or TRITON_INTERPRET=1 to try them slowly, where this is {device.type}"


def choices(model: nn.Module, wanted: Wanted, device: torch.device, dtype: torch.dtype) -> dict[str, Choice]:
    """The choice for every operation that the model has, by name.

    Raises ValueError for an operation that it does not have, and for an implementation that cannot be called.
    """
    by_name = {EVERY: wanted} if isinstance(wanted, str) else dict(wanted)
    every = by_name.pop(EVERY, AUTO)
    found: dict[str, list[Op]] = {}
    for module in model.modules():
        if isinstance(module, Op):
            found.setdefault(module.name, []).append(module)
    if unknown := [name for name in by_name if name not in found]:
        raise ValueError(
            f"kernels.{unknown[0]} is given, and the model has no operation of this name; it has "
            f"{', '.join(sorted(found)) or 'none that can be chosen'}"
        )
    return {name: common(ops, by_name.get(name), every, device, dtype) for name, ops in sorted(found.items())}


def common(ops: list[Op], own: str | None, every: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The choice for all operations of a name. own: what is asked of it; every: of all operations."""
    if own is None and every not in ops[0].known:
        own = AUTO  # it does not have what others are asked to be
    # What one layer's cannot be, none is.
    return max((op.choice(own or every, device, dtype) for op in ops), key=lambda choice: len(choice.passed_over))
