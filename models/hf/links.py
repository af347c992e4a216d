"""How parameters of ours are stored in the files of an architecture that Hugging Face transformers has, both ways.

Shape suffixes: E experts, I inputs, O outputs.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Link:
    """Parameters `ours` hold what tensors `theirs` hold. This one: the same tensor by another name."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        """In the order of `theirs`. Runs on the meta device too, which tells the shapes."""
        return ours

    def to_ours(self, theirs: list[Tensor]) -> list[Tensor]:
        """The inverse, bit for bit."""
        return theirs


@dataclasses.dataclass(frozen=True)
class Stacked(Link):
    """Ours [E, I, O] acts as x @ w; theirs are E linear layers, each [O, I]."""

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        (ours_EIO,) = ours
        return [expert_IO.T for expert_IO in ours_EIO]

    def to_ours(self, theirs: list[Tensor]) -> list[Tensor]:
        return [torch.stack([expert_OI.T for expert_OI in theirs])]


def renamed(names: dict[str, str], prefix: str, theirs: str) -> list[Link]:
    """A `Link` for each of `names`, ours behind `prefix` and theirs behind `theirs`."""
    return [Link((prefix + one,), (theirs + other,)) for one, other in names.items()]
