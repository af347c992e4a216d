"""A norm and the product behind it in plain torch.

Shape suffixes: `...` rows, D width, K columns.
"""

import torch.nn.functional as F
from torch import Tensor

from models.params import upcast


def normed_product(x_D: Tensor, columns_DK: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """norm(x) columns, [..., K], at least float32. With a bias the norm is LayerNorm, without one RMSNorm."""
    if bias_D is None:
        normed_D = F.rms_norm(x_D, x_D.shape[-1:], weight_D, eps)
    else:
        normed_D = F.layer_norm(x_D, x_D.shape[-1:], weight_D, bias_D, eps)
    return upcast(normed_D @ columns_DK)
