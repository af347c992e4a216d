"""Cross-entropy of a linear map without ever holding all its logits.

Tokens go in chunks: a chunk's logits are made, turned into its loss and gradients, and dropped. The gradients, which
are as large as the inputs, wait for the backward pass, which only scales them. The vocabulary may be split over ranks.
Shape suffixes: N tokens, C tokens of a chunk, D width, V vocabulary (this rank's part).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.blocks import row_blocks

IGNORE = -100
# Logits of a chunk. Below this a chunk's products no longer run at the speed of large ones.
CHUNK_LOGITS = 2**24
LEAST_TOKENS = 256


class WholeVocabulary:
    """This process has every logit. `parallel/` has the other kind.

    offset: the first token id of this rank's logits.
    """

    offset = 0

    def join(self, own_C: Tensor, picked_C: Tensor) -> tuple[Tensor, Tensor]:
        """(logsumexp over the vocabulary, the target's logit), from the logsumexp over this rank's part and the logit
        of a target in it, 0 for another."""
        return own_C, picked_C

    def rescale(self, p_CV: Tensor, own_C: Tensor, all_C: Tensor) -> None:
        """Turn the softmax over this rank's part into the softmax over all, in place."""


def linear_cross_entropy(
    h_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    vocabulary: WholeVocabulary | None = None,
    counted_N: Tensor | None = None,
) -> Tensor:
    """Sum (shape [], at least float32) over the tokens with a target (not -100) of -log softmax(h W^T)[target].

    counted_N: bool; only these tokens count in the value, while the gradient is that of all.
    """
    return _LinearCrossEntropy.apply(h_ND, weight_VD, targets_N, vocabulary or WholeVocabulary(), counted_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        vocabulary: WholeVocabulary,
        counted_N: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(h_ND.dtype, torch.float32)
        learns = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dh_ND = torch.empty_like(h_ND) if learns else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if learns else None
        loss_N = h_ND.new_empty(h_ND.shape[0], dtype=wide)
        size = max(LEAST_TOKENS, CHUNK_LOGITS // weight_VD.shape[0])
        for start in range(0, h_ND.shape[0], size):
            chunk = slice(start, start + size)
            h_CD, targets_C, loss_C = h_ND[chunk], targets_N[chunk], loss_N[chunk]
            logits_CV = F.linear(h_CD, weight_VD)
            for block in row_blocks(logits_CV):
                loss_C[block] = _differentiate(logits_CV[block], targets_C[block], vocabulary)
            valid_C = targets_C != IGNORE
            loss_C *= valid_C
            if dh_ND is None or dweight_VD is None:
                continue
            valid_C1 = valid_C[:, None].to(h_ND.dtype)
            dh_ND[chunk] = (logits_CV @ weight_VD) * valid_C1
            dweight_VD += logits_CV.mT @ (h_CD * valid_C1)
        if dh_ND is not None and dweight_VD is not None:
            ctx.save_for_backward(dh_ND, dweight_VD.to(weight_VD.dtype))
        return (loss_N if counted_N is None else loss_N * counted_N).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dh_ND, dweight_VD = ctx.saved_tensors
        return dh_ND * grad.to(dh_ND.dtype), dweight_VD * grad.to(dweight_VD.dtype), None, None, None


def _differentiate(logits_CV: Tensor, targets_C: Tensor, vocabulary: WholeVocabulary) -> Tensor:
    """The cross-entropy [C] of each row, whose logits become the gradient; of no meaning where there is no target."""
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    # Not softmax(dtype=wide), which on CPUs takes five times as long as the two steps.
    p_CV = logits_CV.to(wide).softmax(-1)
    # The largest probability is at least 1/V, so that its logarithm is safe where that of others is not.
    own_C = logits_CV.amax(-1).to(wide) - p_CV.amax(-1).log()
    id_C = targets_C - vocabulary.offset
    mine_C = (id_C >= 0) & (id_C < logits_CV.shape[-1])
    id_C1 = id_C.where(mine_C, 0)[:, None]
    all_C, picked_C = vocabulary.join(own_C, logits_CV.gather(-1, id_C1)[:, 0].to(wide) * mine_C)
    vocabulary.rescale(p_CV, own_C, all_C)
    p_CV.scatter_add_(-1, id_C1, -mine_C[:, None].to(wide))
    logits_CV.copy_(p_CV)
    return all_C - picked_C
