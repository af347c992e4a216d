"""Short causal depthwise convolution along the sequence, within documents.

Shape suffixes: B batch, T sequence, S = T plus the W - 1 tokens before it, H heads, K head width, W kernel width.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class FanInUniform:
    """Uniform within 1 / sqrt(fan_in): torch's own initialisation of a convolution, and of its bias."""

    fan_in: int

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(self.fan_in)


def short_conv(x_BSHK: Tensor, weight_HKW: Tensor, bias_HK: Tensor | None, documents_BS: Tensor | None) -> Tensor:
    """y_t = bias + sum_{j < W} weight[W-1-j] x_{t-j} over the tokens of t's document. Returns [B, T, H, K]."""
    width = weight_HKW.shape[-1]
    length = x_BSHK.shape[1] - (width - 1)
    y = x_BSHK[:, width - 1 :] * weight_HKW[..., -1]
    for start in range(width - 1):
        x = x_BSHK[:, start : start + length]
        if documents_BS is not None:
            same_BT = documents_BS[:, start : start + length] == documents_BS[:, width - 1 :]
            x = x * same_BT[..., None, None]
        y = y + x * weight_HKW[..., start]
    return y if bias_HK is None else y + bias_HK


def prepend(x_BT: Tensor, past: Tensor | None, width: int, fill: int = 0) -> Tensor:
    """The W - 1 tokens before `x`: the cached ones, or `fill`."""
    if past is not None:
        return torch.cat([past, x_BT], 1)
    return F.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (width - 1, 0), value=fill)


def tail(x_BS: Tensor, real_B: Tensor, width: int) -> Tensor:
    """The last W - 1 tokens before padding, where row b has `real_B[b]` tokens behind the W - 1 that came before."""
    index = real_B[:, None] + torch.arange(width - 1, device=x_BS.device)
    return x_BS.take_along_dim(index.view(*index.shape, *(1,) * (x_BS.dim() - 2)), 1)
