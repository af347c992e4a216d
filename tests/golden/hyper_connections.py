"""Hyper-connections: single connections, stacks of them, and the fractional ones. Branches are tanh(u W^T)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.residual.hyper import HyperConnections, StaticHyperConnections
from models.residual.hyper_fractional import FractionalHyperConnections
from models.slots import Connection, ResidualConfig
from tests.connections import Applied, Params, call, context

NAMES = {
    "static_alpha": "static_alpha",
    "static_beta": "static_beta",
    "dynamic_alpha_fn": "dynamic_alpha",
    "dynamic_beta_fn": "dynamic_beta",
    "dynamic_alpha_scale": "alpha_scale",
    "dynamic_beta_scale": "beta_scale",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "norm.gamma": "norm.gamma",
}


class Traced(Applied):
    """Also returns what the connection computes on the way."""

    def forward(self, state, branch):  # type: ignore[override]
        views, kept = self.connection.read(state)
        x_BTD = views.q_BTD
        mixed = self.connection.write(state, kept, torch.zeros_like(x_BTD))["streams"]
        return x_BTD, mixed, kept["beta"], self.connection.write(state, kept, branch(x_BTD))["streams"]


def branch(params: Params) -> Callable[[Tensor], Tensor]:
    return lambda u: torch.tanh(F.linear(u, params["branch.weight"]))


def residual(params: Params, config: dict) -> ResidualConfig:
    if "dynamic_alpha_fn" not in params and config.get("num_fracs", 1) == 1:
        return StaticHyperConnections(config["n"])
    # The package divides by max(|x|, 1e-12), which a vanishing eps comes to; the paper's layer norm has its own eps.
    norm, eps = ("layer", config["norm_eps"]) if "norm_eps" in config else ("rms", 1e-30)
    activation = "tanh" if config.get("tanh", True) else "identity"
    if config.get("num_fracs", 1) > 1:
        return FractionalHyperConnections(config["n"], norm, eps, activation, fractions=config["num_fracs"])
    return HyperConnections(config["n"], norm, eps, activation)


def ours(connection: Connection, params: Params, config: dict) -> Params:
    mapped = {f"connection.{ours}": params[theirs] for theirs, ours in NAMES.items() if theirs in params}
    for name in ("connection.alpha_scale", "connection.beta_scale"):
        if name in mapped:
            mapped[name] = mapped[name].reshape(1)
    if (fractions := config.get("num_fracs", 1)) > 1:
        # Their static part is the same for all source fractions; ours may differ.
        beta = mapped["connection.static_beta"].unflatten(0, (config["n"], fractions))
        mapped["connection.static_beta"] = beta.expand(fractions, -1, -1)
        for name, own in connection.named_parameters():  # of a static case, which lists no others
            mapped.setdefault(f"connection.{name}", torch.zeros_like(own, dtype=beta.dtype))
    elif "connection.dynamic_beta" in mapped:
        mapped["connection.dynamic_beta"] = mapped["connection.dynamic_beta"][:, None]
    return mapped


def run(inputs: Params, params: Params, config: dict) -> Params:
    if "layers" in config:
        return stack(inputs["x"], params, config)
    streams_BTND = inputs["streams"].transpose(1, 2)
    place = context(inputs["streams"].shape[-1], 0, 1)
    connection = residual(params, config).connect(place, "mixer", torch.nn.Identity())
    traced = Traced(connection)
    x_BTD, mixed, beta, streams = call(
        traced, ours(connection, params, config), {"streams": streams_BTND}, branch(params)
    )
    batch, time = x_BTD.shape[:2]
    if (fractions := config.get("num_fracs", 1)) > 1:
        beta = beta.unflatten(-1, (-1, fractions))
    else:
        beta = beta.squeeze(-2).expand(batch, time, -1)
        if "norm_eps" not in config:
            beta = beta[:, :, None, :, None]
    return {
        "branch_input": x_BTD,
        "mixed_streams": mixed.transpose(1, 2),
        "beta": beta,
        "streams": streams.transpose(1, 2),
    }


def stack(x_BTD: Tensor, params: Params, config: dict) -> Params:
    layers = [
        {name.removeprefix(f"layers.{index}."): p for name, p in params.items() if name.startswith(f"layers.{index}.")}
        for index in range(config["layers"])
    ]
    kind = residual(layers[0], config)
    state = kind.open(x_BTD.shape[-1])(x_BTD)
    for index, own in enumerate(layers):
        place = context(x_BTD.shape[-1], index // 2, (len(layers) + 1) // 2)
        connection = kind.connect(place, "ffn" if index % 2 else "mixer", torch.nn.Identity())
        state = call(Applied(connection), ours(connection, own, config), state, branch(own))
    return {"y": kind.close(x_BTD.shape[-1], (len(layers) + 1) // 2)(state)}
