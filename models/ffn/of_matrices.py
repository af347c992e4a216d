"""What FFNs made of a few maps share."""

from collections.abc import Mapping

from torch import Tensor

from models.matrices.base import Matrix
from models.slots import FFN


class MatrixFFN(FFN):
    """Its maps are of a kind that the config chooses."""

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        for module in self.children():
            if isinstance(module, Matrix):
                module.after_step()
