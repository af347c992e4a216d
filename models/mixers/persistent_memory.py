"""Attention beside a learned memory, which can take the place of the channel mixer (arXiv 1907.01470).

Shape suffixes: J key/value heads, N slots, K key and V value width of a head.
"""

import dataclasses
from types import MappingProxyType

from torch import Tensor, nn

from models.context import LayerContext
from models.kernels.attention import Attend
from models.kernels.attention.by_blocks import SoftmaxWithMemory
from models.limits import at_least
from models.mixers.attention import Attention, AttentionConfig
from models.params import Axis, Normal, declare
from models.slots import Mixer


@dataclasses.dataclass(frozen=True)
class PersistentMemoryConfig(AttentionConfig, kind="persistent_memory"):
    """Attention to tokens and to learned keys and values, in one softmax (Sukhbaatar et al., arXiv 1907.01470).

    slots: key-value pairs of each key/value head, which every token sees; they have no position. 4 x d_model of them
    hold what an FFN of width 4 x d_model holds, and ffn none beside them is the paper's all-attention network. The
    rest is as in attention.
    """

    slots: int = 1024

    example = MappingProxyType({**AttentionConfig.example, "slots": 5})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "slots", hint="; attention is the mixer without any")

    def build(self, ctx: LayerContext) -> Mixer:
        return PersistentMemory(self, ctx, self.built_head_dim(ctx.d_model))

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        head_dim = self.head_dim or d_model // self.num_heads
        return super().flops_per_token(d_model, sequence) + 4 * self.num_heads * head_dim * self.slots


class PersistentMemory(Attention):
    """Entries are stored smaller than they are used, by sqrt(K) for keys and sqrt(N) for values: they start with
    deviation 1, and learn that much faster."""

    config: PersistentMemoryConfig
    memory_k: nn.Parameter
    memory_v: nn.Parameter

    def __init__(self, config: PersistentMemoryConfig, ctx: LayerContext, head_dim: int) -> None:
        super().__init__(config, ctx, head_dim)
        self.softmax = None
        kv_heads, _ = config.value_shape(ctx.d_model)
        shape, axes = (kv_heads, config.slots, head_dim), (Axis("kv_heads", kv_heads), None, None)
        declare(self, "memory_k", shape, Normal(head_dim**-0.5), axes)
        declare(self, "memory_v", shape, Normal(config.slots**-0.5), axes)

    def core_weights(self) -> dict[str, Tensor]:
        return {"memory_k": self.memory_k, "memory_v": self.memory_v}

    def reading(self, heads: dict[str, Tensor], weights: dict[str, Tensor]) -> Attend:
        k_JNK, v_JNV = weights["memory_k"], weights["memory_v"]
        return SoftmaxWithMemory(heads["q"], k_JNK * k_JNK.shape[-1] ** 0.5, v_JNV * v_JNV.shape[1] ** 0.5)
