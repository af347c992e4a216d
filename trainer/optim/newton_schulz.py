"""The nearest orthogonal matrix, approximately, by matrix products alone.

Shape suffixes: S matrices, M rows, N columns.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def orthogonalized(x_SMN: Tensor, steps: int) -> Tensor:
    """U V^T of each matrix U S V^T, but for singular values that end between about 0.7 and 1.2 (0 stays 0).

    Quintic Newton-Schulz iteration X <- a X + (b A + c A^2) X with A = X X^T, on X / |X|, in the type of x. Source:
    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024, whose coefficients these are.
    """
    a, b, c = COEFFICIENTS
    tall = x_SMN.shape[-2] > x_SMN.shape[-1]
    x = x_SMN.mT if tall else x_SMN
    x = x / x.flatten(1).norm(dim=1).clamp(min=EPS)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
