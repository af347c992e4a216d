"""Mixture of experts, dropless: each token takes its top_k experts, however many others take them too.

Shape suffixes: B batch, T sequence, N = B*T tokens, D model width, E experts, K picks, M = N*K rows.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Self

import torch
from torch import Tensor

from models.context import LayerContext
from models.ffn.balance import StatsGroup, z_loss
from models.ffn.experts import Experts, SharedExpert
from models.ffn.routed import RoutedFFN
from models.ffn.routers import SELECTIONS, LinearRouter
from models.limits import above_zero, at_least
from models.params import Linear, upcast
from models.slots import FFN, FFNConfig
from models.state import Result, Side, State


@dataclasses.dataclass(frozen=True)
class MoEConfig(FFNConfig, kind="moe"):
    """SwiGLU experts behind a linear router (Switch, arXiv 2101.03961; Mixtral, 2401.04088; DeepSeek-V3, 2412.19437).

    hidden: width of an expert. shared_hidden: width of one more expert that every token takes; 0 for none.
    shared_gate: its output is multiplied by the sigmoid of one projection of the token (Qwen2-MoE, arXiv 2407.10671).
    score: of an expert, from its logit. normalize: the picks' weights sum to `scale`. aux_coef: of Switch's balance
    loss. z_coef: of the router z-loss. balance_rate: step of the selection bias that evens out loads without a loss;
    0 for none. stats_group: the tokens over which the balance loss counts loads.
    """

    num_experts: int
    top_k: int
    hidden: int
    shared_hidden: int = 0
    shared_gate: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    aux_coef: float = 0.01
    z_coef: float = 0.0
    balance_rate: float = 0.0
    stats_group: StatsGroup = "sequence"

    example = MappingProxyType({"num_experts": 4, "top_k": 2, "hidden": 8, "shared_hidden": 8, "balance_rate": 0.001})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_experts", "hidden")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}; it must lie between 1 and num_experts, which is {self.num_experts}"
            )
        if self.normalize and self.top_k == 1:
            raise ValueError(
                "normalize with top_k 1 makes every weight 1 and leaves the router untrained; set normalize: false"
            )
        if self.shared_gate and not self.shared_hidden:
            raise ValueError(
                "shared_gate has no shared expert to act on; give shared_hidden, or set shared_gate: false"
            )
        above_zero(self, "scale")
        at_least(self, 0, "shared_hidden", "aux_coef", "z_coef", "balance_rate", hint=", which turns it off")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(self, aux_coef=0.0, z_coef=0.0, stats_group="sequence")

    def build(self, ctx: LayerContext) -> FFN:
        return MoE(self, ctx)

    def active_share(self) -> float:
        return self.top_k / self.num_experts


class MoE(RoutedFFN):
    """`y = sum_k w_k expert_k(x) (+ shared(x), gated or not)`."""

    balance_bias: Tensor

    def __init__(self, config: MoEConfig, ctx: LayerContext) -> None:
        super().__init__(config.stats_group)
        self.config = config
        self.has_losses = config.aux_coef > 0 or config.z_coef > 0
        self.router = LinearRouter(ctx.d_model, config.num_experts)
        self.select = SELECTIONS[config.score](config.top_k, config.normalize, config.scale)
        self.experts = Experts(config.num_experts, ctx.d_model, config.hidden, ctx.output_init)
        self.shared = SharedExpert(ctx.d_model, config.shared_hidden, ctx.output_init) if config.shared_hidden else None
        self.shared_gate = Linear(ctx.d_model, 1) if config.shared_gate else None
        if config.balance_rate:
            self.declare_buffer("balance_bias", (config.num_experts,), 0.0)

    def forward(self, x_BTD: Tensor, inputs: State, side: Side) -> Result:
        config, valid_BT = self.config, side.valid_BT
        routing = self.select(self.router(x_BTD), self.balance_bias if config.balance_rate else None)
        x_ND = x_BTD.flatten(0, 1)
        y_MD = self.dispatch(x_ND.repeat_interleave(config.top_k, 0), routing.index_BTK.flatten(), self.experts)
        y_NKD = upcast(y_MD).unflatten(0, (-1, config.top_k))
        out_ND = (y_NKD * routing.weights_BTK.flatten(0, 1)[..., None]).sum(1).to(x_BTD.dtype)
        if self.shared is not None:
            shared_ND = self.shared(x_ND)
            if self.shared_gate is not None:
                shared_ND = shared_ND * self.shared_gate(x_ND).sigmoid()
            out_ND = out_ND + shared_ND
        terms_E, load_E = self.balance(routing, valid_BT)
        losses = {}
        if config.aux_coef:
            losses["load_balance"] = config.aux_coef * config.num_experts * terms_E.sum()
        if config.z_coef:
            losses["router_z"] = config.z_coef * z_loss(routing.logits_BTE, valid_BT)
        return Result(out_ND.view_as(x_BTD), losses=losses, stats={"expert_load": load_E})

    @torch.no_grad()
    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """bias += rate * sign(mean load - load), from the loads of the whole step (DeepSeek, arXiv 2408.15664)."""
        if self.config.balance_rate:
            load_E = stats["expert_load"].to(self.balance_bias.device, torch.float64)
            step_E = (load_E.mean() - load_E).sign() * self.config.balance_rate
            self.balance_bias.add_(step_E.to(self.balance_bias.dtype))
