"""Small models for tests of residual topologies."""

from typing import Any

import torch
from torch import Tensor, nn

from models.config import LayerConfig, LMConfig
from models.ffn.swiglu import SwiGLUConfig
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.norms.pre import PreNorm
from models.params import initialize
from models.slots import ResidualConfig


def build(residual: ResidualConfig, seed: int = 0, **slots: Any) -> LM:
    # The eps is negligible: several streams end as a multiple of one, from which an eps would tell them.
    layer = LayerConfig(AttentionConfig(num_heads=4), SwiGLUConfig(hidden=12))
    model = LM(LMConfig(16, 8, {"A": layer}, "AAA", residual=residual, norm=PreNorm(1e-30), **slots)).double()
    initialize(model, seed)
    return model


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Make every parameter matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def tokens() -> Tensor:
    return torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(1))
