"""MoE++'s gate: which experts a token takes and with what weight, where some of them are nothing (arXiv 2410.07348)."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from models.kernels.masked_gate.reference import masked_gate
from models.kernels.op import Op


class MaskedGate(Op):
    """(logits [..., E], earlier [..., E] or None, top_k, first_zero, picked [..., K] or None) -> (logits, probs, index,
    weights); see `reference`."""

    name = "masked_gate"
    reference: ClassVar[Callable[..., Any]] = staticmethod(masked_gate)
    others = MappingProxyType({"triton": "models.kernels.masked_gate.triton:masked_gate"})
