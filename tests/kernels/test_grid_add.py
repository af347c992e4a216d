"""Steps on the grid and the norm behind them: Triton's kernels, interpreted, against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels.grid_add import GridAdd
from models.kernels.grid_add.reference import grid_add
from models.memory.none import NoneConfig
from models.memory.reversible import ReversibleConfig
from models.params import RMSNorm
from tests.contract.tiny import build
from tests.kernels.interpreted import compare, draw, implementation, poisoned
from tests.parallel.test_memory import step
from tests.slow import in_turn


def normed(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(len(weight), 1e-6)
    del norm.weight
    norm.weight = weight  # type: ignore[assignment]
    return norm


@pytest.mark.parametrize("width", [1, 7, 64, 1025])
@pytest.mark.parametrize("bits", [None, 10, 44])
@pytest.mark.parametrize(("count", "factor"), [(0, 1.0), (1, 1.0), (2, 0.3)])
@pytest.mark.parametrize("has_norm", [True, False])
def test_equals_the_reference(width: int, bits: int | None, count: int, factor: float, has_norm: bool) -> None:
    def stepped(call: Callable[..., Any], x: Tensor, *others: Tensor) -> list[Tensor]:
        added, norm = others[:count], normed(others[-1]) if has_norm else None
        out, after = call(x, added, factor, bits, norm)
        return [2 * out, *([] if after is None else [after])]

    weight = [draw(width)] if has_norm else []
    compare("grid_add", stepped, *(draw(3, 5, width) + index for index in range(1 + count)), *weight)


def test_no_tokens() -> None:
    def stepped(call: Callable[..., Any], x: Tensor, added: Tensor, weight: Tensor) -> list[Tensor]:
        return call(x, (added,), 1.0, 10, normed(weight))

    compare("grid_add", stepped, draw(0, 8), draw(0, 8) + 1, draw(8))


@pytest.mark.parametrize("bits", [1, 14, 22])
def test_a_float32_stream_is_rounded_as_in_plain_torch(bits: int) -> None:
    """Bit for bit: ties, values that have no digits behind the point, and those of either sign."""
    ties = torch.arange(-40.0, 40.0) * 2.0 ** -(bits + 1)
    random = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-10.0, 30.0).repeat(10)
    out = torch.cat([ties, random])[None]
    x = torch.zeros_like(out)
    with poisoned():
        found, _ = implementation("grid_add", "triton")(x, (out,), 1.0, bits, None)
    assert torch.equal(found, grid_add(x, (out,), 1.0, bits, None)[0])


def test_types_are_those_of_plain_torch() -> None:
    """A float32 stream and a bfloat16 branch: the sum is exact on the grid, the norm in the type of its weight."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(6, 33, generator=generator) * 2**14).round() / 2**14
    out = torch.randn(6, 33, generator=generator).bfloat16()
    weight = torch.ones(33, dtype=torch.bfloat16)
    expected = grid_add(x, (out,), 1.0, 14, normed(weight))
    with poisoned():
        found = implementation("grid_add", "triton")(x, (out,), 1.0, 14, normed(weight))
    assert torch.equal(found[0], expected[0]) and found[1] is not None and found[1].dtype == torch.bfloat16
    # Torch rounds before the weight too; the interpreter cuts off.
    torch.testing.assert_close(found[1], expected[1], rtol=2.0**-7, atol=0)


def test_running_a_step_again_has_its_bits() -> None:
    """What is normed beside a sum is what is normed of that sum alone."""
    x, out = (draw(6, 33).detach().float() + shift for shift in (0.0, 1.0))
    norm = normed(torch.ones(33))
    call = implementation("grid_add", "triton")
    total, beside = call(x, (out,), 1.0, 14, norm)
    assert torch.equal(beside, call(total, (), 1.0, None, norm)[1])


@pytest.mark.parametrize(("residual", "norm"), in_turn(("reversible", "midpoint", "multi_split"), ("pre", "post")))
def test_a_model_that_is_undone_gets_the_bits_of_one_that_is_kept(
    residual: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, a write and the norm behind it are one kernel; where a step runs again they are two."""
    config = build(repeat=3, norm=norm, residual={"kind": residual, "grid_bits": 14})
    plain = step(config, NoneConfig(), torch.float64)
    monkeypatch.setattr(GridAdd, "reference", staticmethod(implementation("grid_add", "triton")))
    with poisoned():
        kept, undone = (step(config, memory, torch.float32) for memory in (NoneConfig(), ReversibleConfig()))
        wide = step(config, NoneConfig(), torch.float64)
    assert kept.loss == undone.loss
    assert all(torch.equal(undone.gradients[name], x) for name, x in kept.gradients.items())
    for name, x in plain.gradients.items():
        torch.testing.assert_close(wide.gradients[name], x, rtol=1e-9, atol=1e-12)
