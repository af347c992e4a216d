"""Weighted sums over depth by Triton's kernels.

Shape suffixes: N tokens, D model width, C ways, J sources.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels import mixing
from models.kernels.opaque import shaped_by


def out_shapes(w_NCJ: Tensor, sources: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(sources[0], memory_format=torch.contiguous_format) for _ in range(w_NCJ.shape[-2])]


@shaped_by(out_shapes)
def mix(w_NCJ: Tensor, sources: list[Tensor]) -> list[Tensor]:
    outs = out_shapes(w_NCJ, sources)
    mixing.mix(w_NCJ, [source.contiguous() for source in sources], outs)
    return outs


def gradient_shapes(w_NCJ: Tensor, sources: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    dw_NCJ = w_NCJ.new_empty(w_NCJ.shape, dtype=mixing.weight_type(w_NCJ, sources[0]))
    return [dw_NCJ, *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in sources)]


@shaped_by(gradient_shapes)
def mix_backward(w_NCJ: Tensor, sources: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The gradients of the weights and of each source."""
    _, *dxs = gradient_shapes(w_NCJ, sources, grads)
    rows, grads = [x.contiguous() for x in sources], [x.contiguous() for x in grads]
    return [mixing.mix_backward(w_NCJ, rows, grads, dxs), *dxs]


class _DepthMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_NCJ: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(w_NCJ, *sources)
        return tuple(mix(w_NCJ, list(sources)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        w_NCJ, *sources = ctx.saved_tensors
        dw_NCJ, *dxs = mix_backward(w_NCJ, sources, list(grads))
        return dw_NCJ.to(w_NCJ.dtype), *dxs


def depth_mix(sources: list[Tensor], w_CJ: Tensor) -> list[Tensor]:
    """See `models.kernels.depth_mix.reference`."""
    shape = sources[0].shape
    w_NCJ = w_CJ if w_CJ.dim() == 2 else w_CJ.flatten(0, -3)
    return [out.view(shape) for out in _DepthMix.apply(w_NCJ, *(x.reshape(-1, shape[-1]) for x in sources))]
