"""A mixture of attention heads: its dense and its sparse form, and all three losses over a micro-batch."""

import torch
from torch import Tensor, nn

from models.config import LayerConfig
from models.context import LayerContext
from models.ffn.swiglu import SwiGLUConfig
from models.mixers.moa import GATES, MixtureOfHeads, MixtureOfHeadsConfig
from models.routers.moa_top_k import MoATopKConfig
from models.state import Side, Views
from tests.models.mixers import side_of

THEIRS = {"aux_coef": "switchloss", "variation_coef": "cvloss", "z_coef": "zloss"}


class Dense(MixtureOfHeads):
    """Every head for all tokens, as ranks with few heads run them."""

    def slots(self, heads: int, side: Side) -> int:
        return heads


class Both(nn.Module):
    """The outputs of the two forms, which must be equal, and the losses."""

    def __init__(self, mixer: MixtureOfHeads) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        views, side, outs = Views.same(x_BTD), side_of(x_BTD.shape[0], x_BTD.shape[1]), []
        own = self.mixer.own_tokens(views, {}, side)
        for kind in (MixtureOfHeads, Dense):
            self.mixer.__class__ = kind
            heads, kept, _ = self.mixer.project(views, {GATES: own.made_by_head[GATES]}, side)
            outs.append(self.mixer.merge(self.mixer.core(heads, {}, side, None)[0], kept))
        torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
        loss = torch.stack(list(own.losses.values())).sum() / x_BTD.shape[:2].numel()
        return (outs[0] + outs[1]) / 2, loss, own.stats["expert_load"]


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    coefficients = {name: config[theirs] for name, theirs in THEIRS.items()}
    router = MoATopKConfig(top_k=config["top_k_heads"], stats_group="microbatch", **coefficients)
    ours = MixtureOfHeadsConfig(config["num_experts"], router, config["head_dim"], rope="none")
    mixer = ours.build(LayerContext(config["embed_dim"], 0, (LayerConfig(ours, SwiGLUConfig(1)),), 1e-6)).double()
    assert isinstance(mixer, MixtureOfHeads)
    weights = {
        "q": params["q_proj.experts.w"].transpose(1, 2).flatten(0, 1),
        "o": params["q_proj.output_experts.w"].flatten(0, 1).T,
        "k": params["k_proj.weight"],
        "v": params["v_proj.weight"],
        "router": params["q_proj.w_gate"].T,
    }
    named = {f"mixer.{name}.weight": weight for name, weight in weights.items()}
    y, loss, load = torch.func.functional_call(Both(mixer), named, (inputs["x"],), strict=True)
    return {"y": y, "aux_loss": loss, "n_selected": load}
