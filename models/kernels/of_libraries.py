"""Operations that torch or other libraries have, several times over."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from models.kernels.op import AUTO, REFERENCE, Choice, Op


class Library(Op):
    """As built it goes by what it is called with, which suits any device; a run fixes one implementation.

    implementations: by name. Packages that may not be there are imported when they are called. reference: one of them.
    automatic: what is called as built.
    """

    implementations: ClassVar[Mapping[str, Callable[..., Any]]]
    automatic: ClassVar[Callable[..., Any]]

    def __init__(self) -> None:
        super().__init__()
        self.call = type(self).automatic

    @property
    def known(self) -> tuple[str, ...]:
        return (AUTO, *self.implementations, REFERENCE)

    def order(self, device: torch.device) -> tuple[str, ...]:
        raise NotImplementedError

    def named(self, implementation: str) -> str:
        """The name of the one that `reference` is."""
        if implementation != REFERENCE:
            return implementation
        return next(name for name, function in self.implementations.items() if function is self.reference)

    def choice(self, asked: str, device: torch.device, dtype: torch.dtype, key: str) -> Choice:
        return super().choice(self.named(asked), device, dtype, key)

    def choose(self, implementation: str) -> None:
        self.call = self.implementations[self.named(implementation)]
