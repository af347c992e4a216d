"""Post-norm on the branch (OLMo 2's reordered norm): x + N F(x)."""

import dataclasses

from torch import Tensor

from models.limits import above_zero
from models.norms.base import NormConfig, Placement
from models.params import RMSNorm
from models.state import Views


@dataclasses.dataclass(frozen=True)
class PostNorm(NormConfig, kind="post"):
    """One RMSNorm behind a branch, before its output joins the stream."""

    eps: float = 1e-6

    def __post_init__(self) -> None:
        above_zero(self, "eps", hint=", and 1e-6 is usual")

    def build(self, d_model: int, views: tuple[bool, ...]) -> Placement:
        return Post(d_model, self.eps)


class Post(Placement):
    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, eps)

    def before(self, views: Views) -> Views:
        # A stream may be wider than the computation, of whose type a norm in front would make it. A view, so that the
        # branch's gradients are added up before they join the stream's, as they are where layers are undone.
        return views.map(lambda x: x.to(self.norm.weight.dtype).view_as(x))

    def after(self, out_BTD: Tensor) -> Tensor:
        return self.norm(out_BTD)
