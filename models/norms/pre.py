"""Pre-norm: x + F(N x) (Xiong et al., arXiv 2002.04745)."""

import dataclasses

from torch import nn

from models.limits import above_zero
from models.norms.base import NormConfig, Placement
from models.params import RMSNorm
from models.state import Views


@dataclasses.dataclass(frozen=True)
class PreNorm(NormConfig, kind="pre"):
    """One RMSNorm in front of a branch, or one for each of its query, key and value inputs where they differ."""

    eps: float = 1e-6

    def __post_init__(self) -> None:
        above_zero(self, "eps", hint=", and 1e-6 is usual")

    def build(self, d_model: int, views: tuple[bool, ...]) -> Placement:
        return Pre(d_model, views, self.eps)


class Pre(Placement):
    def __init__(self, d_model: int, views: tuple[bool, ...], eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(d_model, eps) if read else nn.Identity() for read in views)

    def before(self, views: Views) -> Views:
        if len(self.norms) == 1:
            return views.map(self.norms[0])
        return Views(*(norm(view) for norm, view in zip(self.norms, views, strict=True)))

    def norm_before(self) -> RMSNorm | None:
        only = self.norms[0]
        return only if len(self.norms) == 1 and isinstance(only, RMSNorm) else None

    def share_before(self, other: Placement) -> None:
        assert isinstance(other, Pre)
        self.norms = other.norms
