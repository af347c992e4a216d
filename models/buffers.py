"""Declared buffers: state that is kept but not learned, such as a balancing bias.

They stay float32 when the model is cast (a step of 1e-3 is below the resolution of bfloat16 near 1), are saved in
checkpoints, and know their first value, so that a model built on the meta device can be filled.
"""

from typing import Any

import torch
from torch import nn

from models.limits import check_size


class Buffers(nn.Module):
    """Base of modules with declared buffers."""

    def declare_buffer(self, name: str, shape: tuple[int, ...], value: float) -> None:
        """Register float32 buffer `name` with every element `value`. Raises ValueError where it is too large."""
        check_size(f"buffer {name!r} of shape", *shape)
        self.register_buffer(name, torch.full(shape, value, dtype=torch.float32))
        first: dict[str, float] = self.__dict__.setdefault("buffer_values", {})
        first[name] = value

    def _apply(self, fn: Any, recurse: bool = True) -> "Buffers":
        before = {name: self._buffers[name] for name in self.__dict__.get("buffer_values", {})}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert old is not None and new is not None
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


@torch.no_grad()
def reset_buffers(model: nn.Module) -> None:
    """Give every declared buffer of `model` its first value."""
    for module in model.modules():
        for name, value in module.__dict__.get("buffer_values", {}).items():
            getattr(module, name).fill_(value)
