"""Small configs: one per discovered kind."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from configs.structure import instantiate
from models.config import LMConfig
from models.depth.base import DepthConfig
from models.ffn.routing import RouterConfig
from models.lm import LM
from models.matrices.base import MatrixConfig
from models.norms.base import NormConfig
from models.params import initialize
from models.plugin import Plugin
from models.slots import FFNConfig, MixerConfig, ResidualConfig, ScalingConfig, ShortcutConfig, ValuesConfig

SLOTS: tuple[type[Plugin], ...] = (
    MixerConfig,
    FFNConfig,
    ResidualConfig,
    ValuesConfig,
    NormConfig,
    ShortcutConfig,
    ScalingConfig,
    DepthConfig,
)
ALL_SLOTS: tuple[type[Plugin], ...] = (*SLOTS, RouterConfig, MatrixConfig)  # the last two stand inside an ffn


def every_kind() -> list[tuple[str, str]]:
    """(slot, kind) of everything that is discovered."""
    return [(slot.slot, kind) for slot in ALL_SLOTS for kind in slot.kinds()]


def plain(slot: str, kind: str) -> dict[str, Any]:
    """The plain config of a kind's example."""
    config = next(base for base in ALL_SLOTS if base.slot == slot).of_kind(kind)
    for name, parameter in inspect.signature(config).parameters.items():
        if parameter.default is parameter.empty and name not in config.example:
            raise ValueError(f"{slot} kind {kind!r} has no default for {name}; give its class an `example` with one")
    return {"kind": kind, **config.example}


def build(num_layers: int = 4, **fields: Any) -> LMConfig:
    """Attention and SwiGLU layers, with `fields` (slots by kind name or plain config) in place."""
    layer: dict[str, Any] = {"mixer": plain("mixer", "attention"), "ffn": plain("ffn", "swiglu")}
    data: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "pattern": "A", "repeat": num_layers}
    for name, value in fields.items():
        value = plain(name, value) if isinstance(value, str) and name in {slot.slot for slot in SLOTS} else value
        (layer if name in layer else data)[name] = value
    return instantiate(LMConfig, {"layers": {"A": layer}, **data})


# Four layers of two mixers, with experts in each.
HYBRID: dict[str, Any] = {
    "pattern": "GGGA",
    "repeat": 1,
    "layers": {
        "G": {"mixer": plain("mixer", "gated_deltanet"), "ffn": plain("ffn", "moe_plus_plus")},
        "A": {"mixer": plain("mixer", "attention"), "ffn": plain("ffn", "moe")},
    },
}


def hybrid() -> LMConfig:
    """A layer of gated DeltaNet and one of attention with experts, in hyper-connections."""
    layers = {
        "A": {"mixer": plain("mixer", "attention"), "ffn": plain("ffn", "moe")},
        "G": {"mixer": plain("mixer", "gated_deltanet"), "ffn": plain("ffn", "swiglu")},
    }
    return build(layers=layers, pattern="GA", num_layers=1, residual="hyper")


def limited_router(kind: str, ffn: str = "moe") -> dict[str, Any]:
    """Plain config of an FFN with this router, whose experts take so few tokens that some are dropped."""
    limited = {} if RouterConfig.of_kind(kind).limits_itself else {"capacity_factor": 0.9}
    return {**plain("ffn", ffn), "router": plain("router", kind), **limited}


def of_matrices(kind: str, ffn: str = "swiglu") -> dict[str, Any]:
    """Plain config of an FFN of such maps, wide enough for their blocks on four tensor ranks."""
    return {**plain("ffn", ffn), "hidden": 32, "matrix": plain("matrix", kind)}


def of_kind(slot: str, kind: str, **others: Any) -> LMConfig:
    """A model with this kind, and with `others` in other slots."""
    chosen: dict[str, Any] = {slot: kind}
    if slot == "router":
        chosen = {"ffn": limited_router(kind)}
    if slot == "matrix":
        chosen = {"ffn": of_matrices(kind)}
    return build(**{**others, **chosen})


def diverges(kinds: Mapping[str, str]) -> str:
    """Why these kinds together leave float64, by slot; empty where they do not."""
    if kinds.get("norm") == "none" and kinds.get("depth", "full").startswith("universal"):
        return (
            f"norm none with depth {kinds['depth']} has a block multiply its input by itself, over and over, which "
            "leaves the range of float64"
        )
    return ""


def spread(config: LMConfig) -> LM:
    """A float64 model whose outputs vary from token to token more than those of a fresh one. Matrices that do not
    start small stay as they are: without norms FFNs multiply their inputs, which would leave float64."""
    model = LM(config).double()
    initialize(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:
                parameter.mul_(8)
    return model


def describe(config: LMConfig) -> str:
    layers = " ".join(f"{layer.mixer.kind}+{layer.ffn.kind}" for layer in config.expanded)
    rest = " ".join(getattr(config, slot.slot).kind for slot in SLOTS[2:])
    return f"{layers} | {rest}{' tied' if config.tie_embeddings else ''}"
