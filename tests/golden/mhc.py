"""Manifold-constrained hyper-connections, single ones: by stream (lucid), flat, and over permutations.

Branches are tanh(u W^T).
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.residual.mhc import ManifoldHyperConnections
from models.residual.mhc_lite import LiteManifoldHyperConnections, permutations
from models.residual.mhc_per_stream import PerStreamManifoldHyperConnections
from models.slots import ResidualConfig
from tests.connections import Applied, Params, call, context

NAMES = {
    "static_alpha": "static_alpha",
    "static_beta": "static_beta",
    "dynamic_alpha_fn": "dynamic_alpha",
    "dynamic_beta_fn": "dynamic_beta",
    "pre_branch_scale": "pre_scale",
    "residual_scale": "mix_scale",
    "h_post_scale": "post_scale",
    "norm.gamma": "norm.gamma",
}
EPS = 1e-30  # the original code divides by max(|x|, 1e-12) instead


class Traced(Applied):
    """Also returns what the connection computes on the way."""

    def forward(self, state, branch):  # type: ignore[override]
        views, kept = self.connection.read(state)
        x_BTD = views.q_BTD
        mixed = self.connection.write(state, kept, torch.zeros_like(x_BTD))["streams"]
        return x_BTD, mixed, kept["beta"], self.connection.write(state, kept, branch(x_BTD))["streams"]


def residual(config: dict) -> ResidualConfig:
    if config["variant"] == "perm":
        return LiteManifoldHyperConnections(config["n"], EPS)
    kind = ManifoldHyperConnections if config["variant"] == "flat" else PerStreamManifoldHyperConnections
    return kind(config["n"], EPS, config["sinkhorn_iters"])


def run(inputs: Params, params: Params, config: dict) -> Params:
    connection = residual(config).connect(context(config["D"], 0, 1), "mixer", nn.Identity())
    shapes = {name: parameter.shape for name, parameter in connection.named_parameters()}
    if "permutations" in params:
        n = config["n"]
        ours = torch.eye(n, dtype=torch.float64)[permutations(n, torch.device("cpu"))]
        assert torch.equal(ours, params["permutations"])
    mapped = {f"connection.{ours}": params[theirs].reshape(shapes[ours]) for theirs, ours in NAMES.items()}
    state = {"streams": inputs["streams"].transpose(1, 2)}
    x_BTD, mixed, beta, streams = call(
        Traced(connection), mapped, state, lambda u: torch.tanh(F.linear(u, params["branch.weight"]))
    )
    return {
        "branch_input": x_BTD,
        "mixed_streams": mixed.transpose(1, 2),
        "beta": beta.mT[:, :, None],
        "streams": streams.transpose(1, 2),
    }
