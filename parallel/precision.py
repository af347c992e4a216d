"""Mixed precision: master weights in float32, forward and backward on copies in the type of the computation.

The same arithmetic wherever a parameter lives. FSDP2 gathers its parameters in the computation's type and reduces
gradients in float32 (`policy`); every other parameter gets a copy here, made once per step inside the autograd graph,
so that each micro-batch's gradient arrives in the computation's type and is added up in the master's. Nothing else is
cast: state entries and modules that ask for float32 keep it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from models.lm import LM


def master(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights are kept and gradients added up."""
    return torch.promote_types(dtype, torch.float32)


def policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """What FSDP2 does about it."""
    if dtype == master(dtype):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=master(dtype), cast_forward_inputs=False)


class ComputeCopies:
    """Copies of a model's parameters in the computation's type, which its modules see in their place during a step.

    A copy is an attribute of the instance, found before the parameter of the same name, which stays where it is: names,
    gradients, checkpoints and optimisers know masters only. It is made when the model first runs within `active`, since
    a parameter that FSDP holds is there no sooner.

    Left alone: what FSDP itself casts. Under split-backward schedules it casts nothing (`parallel.data`), because there
    torch adds the micro-batches' gradients to those of the gathered parameters, in their type.
    """

    def __init__(self, model: LM, dtype: torch.dtype, splits_backward: bool) -> None:
        self.dtype, self._active = dtype, False
        self._places: list[tuple[nn.Module, str]] = []
        self._made: list[tuple[nn.Module, str]] = []
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if splits_backward or not isinstance(parameter, DTensor):
                    self._places.append((module, name))
        if dtype != master(dtype):
            model.register_forward_pre_hook(self._make)

    def _make(self, *_: Any) -> None:
        assert self._active, "a model with master weights runs within `active`"
        if not self._made:
            for module, name in self._places:
                parameter = getattr(module, name)
                assert not isinstance(parameter, DTensor), name
                module.__dict__[name] = parameter.to(self.dtype)
                self._made.append((module, name))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While the forward and backward passes of one step, or of one evaluation, run."""
        self._active = True
        try:
            yield
        finally:
            self._active = False
            for module, name in self._made:
                del module.__dict__[name]
            self._made.clear()
