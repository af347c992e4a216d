"""What a model costs: parameters, those that a token uses, and FLOPs.

A product of a token with a matrix of P elements takes 2 P FLOPs, once at every place that has the matrix. The rest
plug-ins count themselves: cores what they do along the sequence; connections, shortcuts, values and depth their
weighted sums over streams, earlier outputs or values, and further uses of a matrix, as for every stream. Norms, gates,
softmaxes, scalings and plain additions are left out. Backward takes twice forward. This is the count that MFU goes by
(Chowdhery et al., arXiv 2204.02311, appendix B).
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from models.config import LayerConfig, LMConfig
from models.layer import Layer
from models.lm import LM
from models.params import ParamSpec, Parts, named_specs


@dataclasses.dataclass(frozen=True)
class Cost:
    """parameters: all of them, shared ones once. active: the elements of the matrices that a token is multiplied with,
    at every place that has them. flops_per_token: of training, forward and backward."""

    parameters: int
    active: float
    flops_per_token: float


def cost(config: LMConfig, sequence: int) -> Cost:
    """Of a model trained on sequences of that many tokens; nothing is allocated."""
    with torch.device("meta"):
        model = LM(config)
    parts = part_costs(model, sequence)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Cost(total, sum(part.active for part in parts), sum(part.flops_per_token for part in parts))


def part_costs(model: LM, sequence: int) -> list[Cost]:
    """Of what lies before the layers of a whole model, each layer, and what lies behind them, each by itself."""
    assert model.embed is not None and model.embed_norm is not None and model.opener is not None
    assert model.closer is not None and model.norm is not None and model.head is not None
    layers = zip(model.blocks, model.config.expanded, strict=True)
    behind = model.closer.flops_per_token(model.config.d_model)
    return [
        part((model.embed, model.embed_norm, model.opener), elements(model.opener), 0.0),
        *(layer_cost(layer, own, model.config.d_model, sequence) for layer, own in layers),
        part((model.closer, model.norm, model.head), model.head.weight.numel() + elements(model.closer), behind),
    ]


def part(modules: tuple[nn.Module, ...], active: float, beside: float) -> Cost:
    """beside: FLOPs of a forward pass that are not products with `active`."""
    held = {parameter for module in modules for parameter in module.parameters()}
    return Cost(sum(parameter.numel() for parameter in held), active, 3 * (2 * active + beside))


def layer_cost(layer: Layer, own: LayerConfig, d_model: int, sequence: int) -> Cost:
    """Of one layer, built from the config `own`."""
    in_core = set(layer.mixer.branch.mixer.core_weights().values())
    share = own.ffn.active_share()
    active = elements(layer.depth) - own.mixer.idle(d_model)
    beside = layer.depth.flops_per_token(d_model)
    beside += own.mixer.flops_per_token(d_model, sequence)
    beside += layer.mixer.branch.values.flops_per_token(own.mixer.value_shape(d_model))
    for sublayer in (layer.mixer, layer.ffn):
        for parameter, spec in matrices(sublayer.branch):
            if parameter not in in_core:
                used = parameter.numel() if sublayer.by_rank is None else sublayer.by_rank.elements(parameter, spec)
                active += used * (share if of_experts(spec) else 1.0)
        # Part by part: what two of them have in common is used by both.
        active += sum(map(elements, (sublayer.connection, sublayer.placement, sublayer.scaling, sublayer.beside)))
        beside += sublayer.connection.flops_per_token(d_model)
        beside += sublayer.beside.flops_per_token(d_model)
    return part((layer,), active, beside)


def matrices(module: nn.Module) -> Iterator[tuple[nn.Parameter, ParamSpec]]:
    """Those that a token is multiplied with: neither tables nor what is only added or scales."""
    for _, owner, attribute, spec in named_specs(module):
        parameter = getattr(owner, attribute)
        if parameter.dim() > 1 and spec.role not in ("embedding", "vector"):
            yield parameter, spec


def elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter, _ in matrices(module))


def of_experts(spec: ParamSpec) -> bool:
    axes = [axis for dim in spec.axes for axis in (dim.axes if isinstance(dim, Parts) else (dim,))]
    return any(axis is not None and axis.name == "experts" for axis in axes)
