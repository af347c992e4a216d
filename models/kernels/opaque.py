"""Functions that torch.compile calls as they are, where its own code for them is slower or it cannot follow them."""

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

import torch
from torch import Tensor, library

Result = TypeVar("Result")
Rest = TypeVarTuple("Rest")


def opaque(function: Callable[..., Result], shapes: Callable[..., Result] | None = None) -> Callable[..., Result]:
    """Under a compiler, make one operator of a function that changes none of its arguments and returns none of them.

    Its derivative is the caller's: an autograd.Function calls one for each direction. It is named after its module, of
    which an exported model brings another one. Shapes of results depend on those of the arguments alone. shapes: makes
    such results of arguments without data; without it the function itself can.
    """
    namespace, name = re.sub(r"\W", "_", function.__module__), function.__name__.strip("_")
    operator = library.custom_op(f"{namespace}::{name}", function, mutates_args=())
    operator.register_fake(shapes or function)

    @functools.wraps(function)
    def call(*args: Any) -> Result:
        return operator(*args) if torch.compiler.is_compiling() else function(*args)

    return call


def shaped_by(shapes: Callable[..., Result]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """`opaque` with these shapes, as a decorator."""
    return functools.partial(opaque, shapes=shapes)


def varying(function: Callable[..., tuple[Tensor, *Rest]], *args: Any) -> tuple[Tensor, *Rest]:
    """`function(*args)`, which a compiler calls as it is, to go on with a first result of any number of rows: otherwise
    it would compile what follows for each number."""
    if not torch.compiler.is_compiling():
        return function(*args)
    # It imports torch's compiler, which takes a second and is there by now.
    from models.kernels.uncompiled import uncompiled

    return uncompiled(function, *args)
