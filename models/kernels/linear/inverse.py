"""The inverse of unit lower triangular matrices."""

import torch
from torch import Tensor


def unit_inverse(strict_CC: Tensor) -> Tensor:
    """(I + M)^-1 for strictly lower triangular M (last two dimensions), by inverting diagonal blocks of doubling size.

    [[A, 0], [X, B]]^-1 = [[A^-1, 0], [-B^-1 X A^-1, B^-1]]. The series I - M + M^2 - ... is shorter to write, but its
    terms reach 1e17 for repeated keys and cancel. Gradients come from one Newton step at the end, which moves the value
    only by rounding and has the derivative -P dM P of the inverse P; so no block step is kept for backward.
    """
    size = strict_CC.shape[-1]
    index = torch.arange(size, device=strict_CC.device)
    eye = torch.eye(size, dtype=strict_CC.dtype, device=strict_CC.device)
    with torch.no_grad():
        inverse, block = eye, 1
        while block < size:
            pair, half = index // (2 * block), index // block
            joins = (pair[:, None] == pair) & (half[:, None] > half)
            inverse = inverse - inverse @ (strict_CC * joins) @ inverse
            block *= 2
    return inverse + inverse @ (eye - inverse - strict_CC @ inverse)
