"""Triton's kernels as parts of layers that torch.compile compiles."""

import functools

import pytest
import torch

from models.kernels.op import Op
from models.lm import LM
from models.params import initialize
from parallel.compiled import compile_layers
from tests.compilers import needs_compiler
from tests.contract.tiny import build
from tests.kernels.interpreted import poisoned

MODELS = {
    "mudd": (
        {"residual": "mudd", "ffn": "moe_plus_plus"},
        {"depth_mix", "masked_gate", "combine", "permute", "queues"},
    ),
    "mhc": ({"residual": "mhc"}, {"stream_mix", "normed_product", "handover", "sinkhorn"}),
}


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MODELS)
def test_a_compiled_model_equals_plain_torch(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient. aot_eager traces as inductor does, and compiles no C++, which takes minutes."""
    others, names = MODELS[kind]
    model = LM(build(num_layers=2, **others)).double()
    initialize(model, 0)
    tokens = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        out = model(tokens[:, :-1], tokens[:, 1:])
        loss = out.loss + sum(out.losses.values())
        return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]

    expected = gradients()
    ops = [module for module in model.modules() if isinstance(module, Op) and "triton" in module.others]
    assert {one.name for one in ops} == names
    for one in ops:
        one.choose("triton")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    compile_layers(model)
    with poisoned():
        found = gradients()
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
