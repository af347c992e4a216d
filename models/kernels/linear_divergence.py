"""The divergence of a linear map's predictions from given ones, without ever holding all its logits.

As in `models.kernels.linear_cross_entropy`: tokens go in chunks, whose gradients wait for the backward pass.
Shape suffixes: N tokens, C tokens of a chunk, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.linear_cross_entropy import CHUNK_LOGITS, IGNORE, LEAST_TOKENS


def linear_divergence(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, teacher_NV: Tensor) -> Tensor:
    """Sum (shape [], at least float32) over the tokens with a target (not -100) of KL(p || q), in nats.

    p = softmax(teacher), whose logits have no gradient, and q = softmax(h W^T) (Hinton et al., arXiv 1503.02531, at
    temperature 1). Which target a token has makes no difference. Both logarithms are taken in float32 at least.
    """
    return _LinearDivergence.apply(h_ND, weight_VD, targets_N, teacher_NV)  # type: ignore[return-value]


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, teacher_NV: Tensor) -> Tensor:
        wide = torch.promote_types(h_ND.dtype, torch.float32)
        dh_ND, dweight_VD = torch.empty_like(h_ND), torch.zeros_like(weight_VD, dtype=wide)
        total = h_ND.new_zeros((), dtype=wide)
        size = max(LEAST_TOKENS, CHUNK_LOGITS // weight_VD.shape[0])
        for start in range(0, h_ND.shape[0], size):
            chunk = slice(start, start + size)
            h_CD, valid_C = h_ND[chunk], targets_N[chunk] != IGNORE
            logq_CV = F.linear(h_CD, weight_VD).to(wide).log_softmax(-1)
            logp_CV = teacher_NV[chunk].to(wide).log_softmax(-1)
            p_CV = logp_CV.exp()
            total += (p_CV * (logp_CV - logq_CV)).sum(-1)[valid_C].sum()
            # d KL / d logits = q - p.
            d_CV = (logq_CV.exp() - p_CV).mul_(valid_C[:, None]).to(h_ND.dtype)
            dh_ND[chunk] = d_CV @ weight_VD
            dweight_VD += d_CV.mT @ h_CD
        ctx.save_for_backward(dh_ND, dweight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dh_ND, dweight_VD = ctx.saved_tensors
        return dh_ND * grad.to(dh_ND.dtype), dweight_VD * grad.to(dweight_VD.dtype), None, None
