"""Small random models of every architecture of transformers that we write or read, and of settings that they share."""

from typing import Any

import torch

from configs.structure import instantiate
from models.config import LMConfig
from models.lm import LM
from models.params import initialize


def attention(**settings: Any) -> dict[str, Any]:
    """Grouped heads whose width is not d_model / num_heads."""
    return {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope_theta": 500.0, **settings}


SWIGLU = {"kind": "swiglu", "hidden": 24}
DELTA = {"kind": "gated_deltanet", "num_heads": 2, "num_value_heads": 4, "head_dim": 4, "expand_v": 2.0}
MOE = {"kind": "moe", "num_experts": 5, "hidden": 8, "router": {"kind": "mixtral", "top_k": 2}}


def config(pattern: str = "A", repeat: int = 2, eps: float = 1e-3, tied: bool = False, **layers: Any) -> LMConfig:
    """eps is large, so that a wrong one shows. layers: (mixer, ffn) by letter."""
    data = {
        "vocab_size": 32,
        "d_model": 16,
        "layers": {letter: {"mixer": mixer, "ffn": ffn} for letter, (mixer, ffn) in layers.items()},
        "pattern": pattern,
        "repeat": repeat,
        "norm": {"kind": "pre", "eps": eps},
        "tie_embeddings": tied,
    }
    return instantiate(LMConfig, data)


GATED = attention(qk_norm=True, output_gate=True, rope_fraction=0.6, head_dim=8)
SHARED = {**MOE, "shared_hidden": 12, "shared_gate": True}
QWEN3 = attention(qk_norm=True)
# By the architecture that holds it, and what is special about it.
CASES: dict[str, LMConfig] = {
    "llama": config(A=(attention(), SWIGLU)),
    "llama tied, heads not grouped": config(
        tied=True, A=({"kind": "attention", "num_heads": 4}, SWIGLU), eps=1e-5, repeat=3
    ),
    "mistral": config(A=(attention(window=3), SWIGLU)),
    "qwen2": config(A=(attention(qkv_bias=True, head_dim=4), SWIGLU), tied=True),
    "qwen3": config(A=(QWEN3, SWIGLU)),
    "qwen3 tied, windows in some layers": config(
        tied=True, pattern="ABB", A=(QWEN3, SWIGLU), B=(attention(qk_norm=True, window=4), SWIGLU), repeat=1
    ),
    "qwen3_moe": config(A=(QWEN3, MOE)),
    "qwen3_moe scores as they are, some layers dense": config(
        pattern="ABA", A=(attention(qk_norm=True, window=5), {**MOE, "router": {"kind": "deepseek_v2", "top_k": 3}}),
        B=(attention(qk_norm=True, window=5), SWIGLU), tied=True, repeat=1,
    ),
    "qwen3_next": config(pattern="GGA", G=(DELTA, SWIGLU), A=(GATED, SWIGLU), repeat=1),
    "qwen3_next sparse and tied": config(
        pattern="GA", G=({**DELTA, "num_value_heads": 2, "expand_v": 1.0, "conv_size": 3}, SHARED), A=(GATED, SHARED),
        tied=True,
    ),
}  # fmt: skip


def model(config: LMConfig, dtype: torch.dtype = torch.float64) -> LM:
    """Random everywhere, the norms and biases too, and more varied than a fresh model."""
    found = LM(config).eval()
    initialize(found, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name and "dt_bias" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif parameter.dim() > 1:
                parameter.mul_(8)
    return found.to(dtype)
