"""Operations with several implementations, and how a run chooses among them.

A module that needs one holds it as a part. As built it is the reference; a run chooses once, before the first step,
says which, and nothing falls back later.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

AUTO, REFERENCE, TRITON, FLOAT8, FLOAT32 = "auto", "reference", "triton", "float8", "float32"
FIRST_WITH_FLOAT8 = (8, 9)  # compute capability
FIRST_TO_COUNT = (3, 7)  # release of Triton: its interpreter loops up to an argument of a kernel with any NumPy
FIRST_TO_REFUSE = (2, 4)  # release of NumPy: an array of one element is no number any more
KEY, EVERY = "kernels", "default"  # in a config: of all operations that it does not name

Wanted = str | Mapping[str, str]  # of all operations, or by the name of each


class Choice(NamedTuple):
    """implementation: what is called. passed_over: those that would have been before it, and why they are not."""

    implementation: str
    passed_over: tuple[tuple[str, str], ...] = ()


class Op(nn.Module):
    """name: in configs. reference: in plain torch. others: every other implementation, as module:function. They are
    imported when they are chosen, since what they need may not be installed. within: the operations that one of these
    does as well, in the same implementation."""

    name: ClassVar[str]
    within: ClassVar[tuple[str, ...]] = ()
    reference: ClassVar[Callable[..., Any]]
    others: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self) -> None:
        super().__init__()
        self.call = type(self).reference

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    @property
    def known(self) -> tuple[str, ...]:
        return (AUTO, *self.others, REFERENCE)

    def order(self, device: torch.device) -> tuple[str, ...]:
        """Those that `auto` tries, fastest first; the last one takes anything."""
        return (*self.others, REFERENCE) if device.type == "cuda" else (REFERENCE,)

    def refusal(self, implementation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot be called there, None where it can."""
        return without_triton(device) if implementation == TRITON else None

    def choice(self, asked: str, device: torch.device, dtype: torch.dtype, key: str) -> Choice:
        """asked: one of `known`, under this key. Raises ValueError for one that cannot be called there."""
        if asked != AUTO:
            if reason := self.refusal(asked, device, dtype):
                raise ValueError(f"{key} is {asked}, and {reason}; use {AUTO} or {REFERENCE}")
            return Choice(asked)
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
            module, _, function = self.others[implementation].partition(":")
            self.call = getattr(importlib.import_module(module), function)


def without_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'weft[triton]')"
    if device.type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return without_interpreter(importlib.import_module("triton").__version__, metadata.version("numpy"))
    return f"Triton's kernels need a GPU, or TRITON_INTERPRET=1 to try them slowly, where this is {device.type}"


def without_interpreter(triton: str, numpy: str) -> str | None:
    """Why Triton's interpreter, of these versions, cannot run kernels that loop up to an argument."""
    if release(triton) < FIRST_TO_COUNT and release(numpy) >= FIRST_TO_REFUSE:
        return f"the interpreter of Triton {triton} takes a NumPy before 2.4, where this is NumPy {numpy}"
    return None


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def without_float8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there are no products of float8 there, for a computation in `dtype`."""
    if device.type != "cuda":
        return f"its products need a GPU of compute capability 8.9 or later, where this is {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) < FIRST_WITH_FLOAT8:
        found = ".".join(map(str, capability))
        return f"its products need a GPU of compute capability 8.9 or later, where this has {found}"
    if dtype != torch.bfloat16:
        return f"its products are of bfloat16, and this computes in {str(dtype).removeprefix('torch.')}"
    return None


def ops_of(model: nn.Module) -> dict[str, list[Op]]:
    """The operations of a model, by name."""
    found: dict[str, list[Op]] = {}
    for module in model.modules():
        if isinstance(module, Op):
            found.setdefault(module.name, []).append(module)
    return dict(sorted(found.items()))


def asked(model: nn.Module, wanted: Wanted) -> dict[str, str]:
    """What is asked of each operation that the model has. Raises ValueError for what there is not."""
    found = ops_of(model)
    by_name = {EVERY: wanted} if isinstance(wanted, str) else dict(wanted)
    every = by_name.pop(EVERY, AUTO)
    for name, own in by_name.items():
        if name not in found:
            raise ValueError(
                f"kernels.{name} is given, and the model has no operation of this name; it has "
                f"{', '.join(found) or 'none that can be chosen'}"
            )
        if own not in (known := found[name][0].known):
            raise ValueError(f"kernels.{name} is {own!r}; use one of {', '.join(known)}")
    known = tuple(dict.fromkeys([AUTO, REFERENCE, *(name for ops in found.values() for name in ops[0].known)]))
    if every not in known:
        raise ValueError(f"kernels is {every!r}, which no operation of the model has; use one of {', '.join(known)}")
    # An operation does not have all that others can be asked to be.
    return {name: by_name.get(name, every if every in ops[0].known else AUTO) for name, ops in found.items()}


def choices(model: nn.Module, wanted: Wanted, device: torch.device, dtype: torch.dtype) -> dict[str, Choice]:
    """The choice for every operation that the model has, by name. Raises ValueError as `asked` and `Op.choice` do, and
    for one that does others as well which are to be done otherwise."""
    found, by_name = ops_of(model), asked(model, wanted)
    made: dict[str, Choice] = {}
    for name, own in by_name.items():
        key = KEY if isinstance(wanted, str) else f"{KEY}.{name if name in wanted else EVERY}"
        each = [op.choice(own, device, dtype, key) for op in found[name]]
        # What one layer's cannot be, none is.
        made[name] = max(each, key=lambda choice: len(choice.passed_over))
    for name, choice in made.items():
        implementation = choice.implementation
        others = [
            part for part in found[name][0].within if part in made and made[part].implementation != implementation
        ]
        if implementation == REFERENCE or not others:
            continue
        reason = f"{others[0]} is {made[others[0]].implementation}"
        if by_name[name] != AUTO:
            raise ValueError(
                f"{KEY}.{name} is {implementation}, which does {others[0]} too, and {reason}; use {KEY}.{name}="
                f"{REFERENCE}, or {implementation} for both"
            )
        made[name] = Choice(REFERENCE, (*choice.passed_over, (implementation, reason)))
    return made
