"""Connections outside a model: read -> branch -> write around any callable, with parameters from a test."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.config import LayerConfig
from models.context import LayerContext
from models.ffn.swiglu import SwiGLUConfig
from models.mixers.attention import AttentionConfig
from models.slots import Connection
from models.state import State

Params = dict[str, Tensor]


class Applied(nn.Module):
    """A sublayer whose branch is handed in."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def forward(self, state: State, branch: Callable[[Tensor], Tensor]) -> State:
        views, kept = self.connection.read(state)
        return self.connection.write(state, kept, branch(views.q_BTD))


def call(module: nn.Module, params: Params, *args):
    """`module(*args)` with exactly `params` in the place of its own parameters; gradients reach them."""
    return torch.func.functional_call(module, params, args, strict=True)


def apply(connection: Connection, params: Params, state: State, branch: Callable[[Tensor], Tensor]) -> State:
    return call(Applied(connection), {f"connection.{name}": value for name, value in params.items()}, state, branch)


def context(d_model: int, index: int, num_layers: int, norm_eps: float = 1e-6) -> LayerContext:
    """The place of layer `index` in a model whose layers' own configs do not matter."""
    layer = LayerConfig(AttentionConfig(num_heads=1), SwiGLUConfig(hidden=1))
    return LayerContext(d_model, index, (layer,) * num_layers, norm_eps)


def causal_mean(x_BTD: Tensor) -> Tensor:
    """The simplest sequence mixer: the mean over a token and those before it."""
    count_T = torch.arange(1, x_BTD.shape[1] + 1, dtype=x_BTD.dtype)
    return x_BTD.cumsum(1) / count_T[:, None]
