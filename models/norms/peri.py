"""Peri-norm (sandwich): x + N_out F(N_in x), with the embedding normed too (Peri-LN, arXiv 2502.02732)."""

import dataclasses

from torch import Tensor, nn

from models.limits import above_zero
from models.norms.base import NormConfig, Placement
from models.norms.pre import Pre
from models.params import RMSNorm


@dataclasses.dataclass(frozen=True)
class PeriNorm(NormConfig, kind="peri"):
    """RMSNorms on both sides of a branch, and one on the embedding."""

    eps: float = 1e-6

    def __post_init__(self) -> None:
        above_zero(self, "eps", hint=", and 1e-6 is usual")

    def build(self, d_model: int, views: tuple[bool, ...]) -> Placement:
        return Peri(d_model, views, self.eps)

    def embedding(self, d_model: int) -> nn.Module:
        return RMSNorm(d_model, self.eps)


class Peri(Pre):
    def __init__(self, d_model: int, views: tuple[bool, ...], eps: float) -> None:
        super().__init__(d_model, views, eps)
        self.out_norm = RMSNorm(d_model, eps)

    def after(self, out_BTD: Tensor) -> Tensor:
        return self.out_norm(out_BTD)
