"""Discrete choices of a forward pass, such as routers' picks, made once for when it runs again.

What runs again may be given inputs that differ in rounding, and a near tie would then send tokens another way than the
one whose gradients are wanted.
"""

from collections.abc import Callable, Hashable

from torch import Tensor


class Choices:
    """Makes choices and keeps them, in order for each owner."""

    def __init__(self) -> None:
        self.made: dict[Hashable, list[Tensor]] = {}

    def __call__(self, owner: Hashable, make: Callable[[], Tensor]) -> Tensor:
        made = make()
        self.made.setdefault(owner, []).append(made)
        return made


class Chosen:
    """Gives choices again as they were made; owners may take turns in another order."""

    def __init__(self, choices: Choices) -> None:
        self._left = {owner: iter(made) for owner, made in choices.made.items()}

    def __call__(self, owner: Hashable, make: Callable[[], Tensor]) -> Tensor:
        return next(self._left[owner])
