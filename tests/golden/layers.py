"""A mixer alone, with the parameters of a case: what the files of golden layers share."""

import torch
from torch import Tensor

from models.config import LayerConfig
from models.context import LayerContext
from models.ffn.swiglu import SwiGLUConfig
from models.slots import Mixer, MixerConfig
from tests.models.mixers import run, side_of


class Layer(torch.nn.Module):
    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTD: Tensor, extra: dict[str, Tensor]) -> Tensor:
        return run(self.mixer, x_BTD, side_of(x_BTD.shape[0], x_BTD.shape[1]), extra=extra)[0]


def run_mixer(
    ours: MixerConfig,
    params: dict[str, Tensor],
    x_BTD: Tensor,
    norm_eps: float,
    extra: dict[str, Tensor] | None = None,
) -> Tensor:
    """params: by our names, every one of them. extra: weights of the core that come from elsewhere."""
    with torch.device("meta"):
        mixer = ours.build(LayerContext(x_BTD.shape[-1], 0, (LayerConfig(ours, SwiGLUConfig(1)),), norm_eps))
    assert {name: p.shape for name, p in mixer.named_parameters()} == {name: p.shape for name, p in params.items()}
    weights = {f"mixer.{name}": p for name, p in params.items()}
    return torch.func.functional_call(Layer(mixer), weights, (x_BTD, extra or {}))


def weights(params: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Of linear maps and norms, by our name and theirs, with their biases; those that the case has."""
    found = {
        f"{ours}.{end}": params.get(f"{theirs}.{end}") for ours, theirs in names.items() for end in ("weight", "bias")
    }
    return {name: x for name, x in found.items() if x is not None}


def convs(params: dict[str, Tensor], heads: dict[str, int]) -> dict[str, Tensor]:
    """Of short convolutions [C, 1, W], by name and number of heads."""
    found = {f"conv_{name}": params.get(f"{name}_conv1d.weight") for name in heads}
    found |= {f"conv_{name}_bias": params.get(f"{name}_conv1d.bias") for name in heads}
    split = {name: (x, heads[name.removeprefix("conv_").removesuffix("_bias")]) for name, x in found.items()}
    return {
        name: (x.squeeze(1) if x.dim() == 3 else x).unflatten(0, (count, -1))
        for name, (x, count) in split.items()
        if x is not None
    }
