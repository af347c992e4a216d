"""How fla's kernels are chosen and called, with stand-ins that keep to its signatures: no GPU, and no fla, is here."""

import itertools
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.kernels.linear import fused as module
from models.kernels.linear.choice import Recurrence
from models.kernels.linear.fused import fused, without_fla
from models.kernels.linear.recurrent import recurrent
from models.kernels.op import ops_of
from models.lm import LM
from models.params import initialize
from tests.contract.tiny import build
from tests.kernels.test_linear import RULES, documents, operands, results

NAMES = {
    "linear attention": "simple_gla",
    "retention": "simple_gla",
    "gated linear attention": "gla",
    "delta rule": "delta_rule",
    "gated delta rule": "gated_delta_rule",
    "kimi delta rule": "kda",
}


def stand_in(name: str, calls: list[str]) -> Callable[..., tuple[Tensor, Tensor]]:
    """As fla 0.6.0 documents it: equal heads, one type, one row where there are documents, and a state for each."""

    def chunk(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        calls.append(name)
        assert q.shape == k.shape and q.shape[:3] == v.shape[:3] and q.dtype == k.dtype == v.dtype
        assert (beta is not None) == ("delta" in name or name == "kda")
        assert name == "simple_gla" or (g is not None) == (name != "delta_rule")
        assert g is None or g.shape == (q.shape if name in ("gla", "kda") else q.shape[:3])
        assert scale is not None and initial_state is not None and output_final_state
        if cu_seqlens is None:
            return recurrent(q, k, v, g, beta, scale=scale, state_BJKV=initial_state)
        assert q.shape[0] == 1 and cu_seqlens[0] == 0 and cu_seqlens[-1] == q.shape[1]
        assert initial_state.shape[0] == len(cu_seqlens) - 1
        outs, states = [], []
        for index, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            part = [None if x is None else x[:, start:stop] for x in (q, k, v, g, beta)]
            out, state = recurrent(*part, scale=scale, state_BJKV=initial_state[index : index + 1])  # type: ignore[arg-type]
            outs.append(out)
            states.append(state)
        return torch.cat(outs, 1), torch.cat(states)

    return chunk


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called of a package that has the kernels by fla's names."""
    found: list[str] = []
    for name in set(NAMES.values()):
        package = types.ModuleType(f"fla.ops.{name}")
        setattr(package, f"chunk_{name}", stand_in(name, found))
        monkeypatch.setitem(sys.modules, package.__name__, package)
    return found


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("length", [2, 33])
def test_arguments_are_as_fla_takes_them(kind: str, packed: bool, length: int, calls: list[str]) -> None:
    x, ids = operands(length, kind=kind), documents(length) if packed else None
    for ours, reference in zip(results(fused, x, ids), results(recurrent, x, ids), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    assert calls == [NAMES[kind]]


def test_every_rule_but_that_of_value_channels_has_a_kernel() -> None:
    assert RULES.keys() - NAMES.keys() == {"gated slots"}


def test_where_they_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(module, "installed", lambda: True)
    assert without_fla(gpu, torch.bfloat16, 256) is None and without_fla(gpu, torch.bfloat16, None) is None
    assert without_fla(gpu, torch.bfloat16, 257) == (
        "its delta rule takes keys of up to 256 channels, where these have 257"
    )
    assert without_fla(gpu, torch.float32, 64) == "its kernels are called in bfloat16, where this is float32"
    assert without_fla(cpu, torch.bfloat16, 64) == "its kernels need a GPU, where this is cpu"
    monkeypatch.setattr(module, "installed", lambda: False)
    assert without_fla(gpu, torch.bfloat16, None) == "flash-linear-attention is not installed"


def test_as_built_a_cpu_calls_none_of_them(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed", lambda: True)
    x = {name: value.bfloat16() for name, value in operands(5).items()}
    state = x.pop("state")
    Recurrence(delta_key=5)(*x.values(), scale=1.0, state_BJKV=state)
    assert calls == []


def test_where_fla_is_chosen_a_mixer_calls_it_but_for_one_token(calls: list[str]) -> None:
    config = build(mixer={"kind": "gated_deltanet", "num_heads": 2, "head_dim": 4}, num_layers=2)
    model = LM(config).double()
    initialize(model, 0)
    tokens = torch.randint(config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    for op in ops_of(model)["recurrence"]:
        op.choose("fla")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-10, atol=1e-10)
    assert calls == ["gated_delta_rule"] * 2
    model(tokens[:, :1])
    assert calls == ["gated_delta_rule"] * 2
