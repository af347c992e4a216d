"""MoE++ as its authors released it (SkyworkAI/MoE-plus-plus), where that differs from the paper.

Shape suffixes: B batch, T sequence, N tokens, D model width, E all experts, H router width, K picks.
"""

import dataclasses
from typing import Literal

from torch import Tensor, nn

from models.context import LayerContext
from models.ffn.moe_plus_plus import MaskedTopK, MoEPlusPlus, MoEPlusPlusConfig
from models.ffn.routing import LinearRouter, Routing
from models.kernels.picks import best
from models.limits import above_zero
from models.slots import FFN
from models.state import Side


@dataclasses.dataclass(frozen=True)
class MoEPlusPlusReleasedConfig(MoEPlusPlusConfig, kind="moe_plus_plus_released"):
    """Adds to the paper's form what released weights need.

    router: two_layer is `W2 tanh(W1 x)` with 8 E hidden units. gating: masked is the paper's; selected is a softmax
    over the picked logits, in which zero experts keep their weight. input_scale: factor on what the experts (not the
    router) see; the release uses 2, and 1 with selected gating or moe_feature_no_mul_topk. logits_std: the logits that
    the gating sees are scaled to this standard deviation over experts; null for as they are.
    """

    router: Literal["two_layer", "linear"] = "two_layer"
    gating: Literal["masked", "selected"] = "masked"
    input_scale: float = 2.0
    logits_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "input_scale")
        above_zero(self, "logits_std", hint=", or null to leave the logits as they are")
        if self.logits_std is not None and self.num_total < 2:
            raise ValueError(
                f"logits_std is {self.logits_std}, and the logit of a single expert has no deviation; use null"
            )

    def build(self, ctx: LayerContext) -> FFN:
        router = {"two_layer": TwoLayerRouter, "linear": LinearRouter}[self.router](ctx.d_model, self.num_total)
        first_zero = self.num_total - self.num_zero
        gating = MaskedTopK(self.top_k, first_zero) if self.gating == "masked" else SelectedTopK(self.top_k)
        select = gating if self.logits_std is None else ScaledLogits(gating, self.logits_std)
        return MoEPlusPlusReleased(self, ctx, router, select)


class TwoLayerRouter(nn.Module):
    """`logits = W2 tanh(W1 x)`."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.inner = LinearRouter(d_model, 8 * num_experts)
        self.outer = LinearRouter(8 * num_experts, num_experts, wide=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.outer(self.inner(x_ND).tanh())


class SelectedTopK(nn.Module):
    """Mixtral's gating: weights are a softmax over the picked logits."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, logits_BTE: Tensor, side: Side, residual_BTE: Tensor | None = None) -> Routing:
        if residual_BTE is not None:
            logits_BTE = logits_BTE + residual_BTE
        index_BTK = side.choose(self, lambda: best(logits_BTE, self.top_k))
        return Routing(logits_BTE, logits_BTE.softmax(-1), index_BTK, logits_BTE.gather(-1, index_BTK).softmax(-1))


class ScaledLogits(nn.Module):
    """`gating` on logits divided by their standard deviation over experts (unbiased), times `std`. The next router adds
    to them as they were."""

    def __init__(self, gating: nn.Module, std: float) -> None:
        super().__init__()
        self.gating, self.std = gating, std

    def forward(self, logits_BTE: Tensor, side: Side, residual_BTE: Tensor | None = None) -> Routing:
        if residual_BTE is not None:
            logits_BTE = logits_BTE + residual_BTE
        routing: Routing = self.gating(logits_BTE * (self.std / logits_BTE.std(-1, keepdim=True)), side)
        return routing._replace(logits_BTE=logits_BTE)


class MoEPlusPlusReleased(MoEPlusPlus):
    config: MoEPlusPlusReleasedConfig

    def expert_input(self, x_ND: Tensor) -> Tensor:
        return x_ND * self.config.input_scale
