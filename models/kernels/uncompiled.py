"""Calls that a compiler leaves alone."""

from collections.abc import Callable
from typing import Any, TypeVarTuple

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic

Rest = TypeVarTuple("Rest")


@torch.compiler.disable()
def uncompiled(function: Callable[..., tuple[Tensor, *Rest]], *args: Any) -> tuple[Tensor, *Rest]:
    """`function(*args)`, whose first result then has any number of rows to a compiler."""
    out = function(*args)
    maybe_mark_dynamic(out[0], 0)
    return out
