"""FLOPs against counts made by hand, and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.cost import cost
from models.lm import LM
from models.params import initialize
from tests.contract.tiny import build


def test_a_llama_by_hand() -> None:
    """6 N per token and 6 L H K T for causal attention."""
    mixer = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    config = build(mixer=mixer, ffn={"kind": "swiglu", "hidden": 24})
    width, layers, sequence = config.d_model, len(config.expanded), 64
    layer = width * 8 * (4 + 2 + 2) + 4 * 8 * width + 3 * width * 24
    found = cost(config, sequence)
    assert found.active == layers * layer + config.vocab_size * width
    assert found.flops_per_token == 6 * found.active + 6 * layers * 4 * 8 * sequence
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * width
    assert found.parameters == layers * (layer + 2 * width) + embeddings + width


@pytest.mark.parametrize("ffn", ["swiglu", "moe"])
def test_products_as_torch_counts_them(ffn: str) -> None:
    """On the forward pass, where a block of attention also computes the half that it masks."""
    config = build(mixer={"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "head_dim": 2}, ffn=ffn)
    model = LM(config).double()
    initialize(model, 0)
    tokens = torch.randint(config.vocab_size, (2, 16))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    masked = len(config.expanded) * 4 * 2 * 2 * 8
    assert counter.get_total_flops() == tokens.numel() * (cost(config, 16).flops_per_token / 3 + masked)
