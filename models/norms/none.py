"""No norm around branches, as in ReZero and Fixup: only the final norm stays."""

import dataclasses

from models.limits import above_zero
from models.norms.base import NormConfig, Placement


@dataclasses.dataclass(frozen=True)
class NoneNorm(NormConfig, kind="none"):
    """Branches read the stream as it is. Deep models need a scaling that starts small, such as rezero (arXiv
    2003.04887). eps: of the norm in front of the head."""

    eps: float = 1e-6

    def __post_init__(self) -> None:
        above_zero(self, "eps", hint=", and 1e-6 is usual")

    def build(self, d_model: int, views: tuple[bool, ...]) -> Placement:
        return Placement()
