"""What a model costs: parameters, those that a token uses, and FLOPs.

A product of a token with a matrix of P elements takes 2 P FLOPs; what cores do along the sequence they count
themselves; norms, gates and softmaxes are left out. Backward takes twice forward. This is the count that MFU goes by
(Chowdhery et al., arXiv 2204.02311, appendix B).
"""

import dataclasses

import torch
from torch import nn

from models.config import LMConfig
from models.lm import LM
from models.params import ParamSpec, Parts, named_specs


@dataclasses.dataclass(frozen=True)
class Cost:
    """parameters: all of them, shared ones once. active: those that a token's forward pass multiplies with, as often as
    it does. flops_per_token: of training, forward and backward."""

    parameters: int
    active: float
    flops_per_token: float


def cost(config: LMConfig, sequence: int) -> Cost:
    """Of a model trained on sequences of that many tokens; nothing is allocated."""
    with torch.device("meta"):
        model = LM(config)
    assert model.head is not None and model.embed is not None
    active = float(model.head.weight.numel())
    core = 0.0
    for layer, own in zip(model.blocks, config.expanded, strict=True):
        in_core = set(layer.mixer.branch.mixer.core_weights().values())
        share = own.ffn.active_share()
        for _, module, attribute, spec in named_specs(layer):
            parameter = getattr(module, attribute)
            if parameter.dim() > 1 and parameter not in in_core and spec.role != "embedding":
                active += parameter.numel() * (share if of_experts(spec) else 1.0)
        active -= own.mixer.idle(config.d_model)
        core += own.mixer.flops_per_token(config.d_model, sequence)
    active += matrices(model.opener) + matrices(model.closer)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Cost(total, active, 3 * (2 * active + core))


def matrices(module: nn.Module | None) -> float:
    return 0.0 if module is None else float(sum(p.numel() for p in module.parameters() if p.dim() > 1))


def of_experts(spec: ParamSpec) -> bool:
    axes = [axis for dim in spec.axes for axis in (dim.axes if isinstance(dim, Parts) else (dim,))]
    return any(axis is not None and axis.name == "experts" for axis in axes)
