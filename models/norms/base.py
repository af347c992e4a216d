"""The slot `norm`: where the norms around a branch lie.

Shape suffixes: B batch, T sequence, D model width.
"""

from torch import Tensor, nn

from models.params import RMSNorm
from models.plugin import Plugin
from models.state import Views


class Placement(nn.Module):
    """Where a branch is normalised. The default leaves both sides alone.

    Its weights lie in modules that it calls, which layers may share.
    """

    def before(self, views: Views) -> Views:
        return views

    def norm_before(self) -> RMSNorm | None:
        """The one in front of all views, where it alone is what `before` does."""
        return None

    def after(self, out_BTD: Tensor) -> Tensor:
        return out_BTD

    def share_before(self, other: "Placement") -> None:
        """Take the norms in front from `other`, the placement around another branch with the same input."""


class NormConfig(Plugin, slot="norm", folder="models.norms"):
    """Placement of the norms around a branch; also makes the embedding's and the final norm."""

    eps: float

    def build(self, d_model: int, views: tuple[bool, ...]) -> Placement:
        """views: of each distinct input of the branch, whether it is read."""
        raise NotImplementedError

    def embedding(self, d_model: int) -> nn.Module:
        return nn.Identity()

    def final(self, d_model: int) -> nn.Module:
        return RMSNorm(d_model, self.eps)
