"""Linear recurrences: the chunked form against the recurrent one, and that against its equation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.linear.chunked import chunked
from models.kernels.linear.inverse import unit_inverse
from models.kernels.linear.recurrent import recurrent

NAMES = ("q", "k", "v", "g", "beta", "state")
# Which decay (per head, per key or value channel, none) a rule has, and whether write strengths.
RULES = {
    "linear attention": ("none", False),
    "retention": ("head", False),
    "gated linear attention": ("channel", False),
    "gated slots": ("value", False),
    "delta rule": ("none", True),
    "gated delta rule": ("head", True),
    "kimi delta rule": ("channel", True),
}


def operands(
    length: int, strength: float = 0.3, batch: int = 2, groups: int = 2, kind: str = "gated delta rule"
) -> dict[str, Tensor]:
    """Random operands in float64; log decays lie in [-strength, 0], write strengths in [0, 2]."""
    decay, delta = RULES[kind]
    heads = 2
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    values, key, value = heads * groups, 5, 3
    x = {
        "q": normal(batch, length, heads, key),
        "k": F.normalize(normal(batch, length, heads, key), dim=-1),
        "v": normal(batch, length, values, value),
        "g": -strength * uniform(batch, length, values, *{"channel": [key], "value": [value]}.get(decay, [])),
        "beta": 2 * uniform(batch, length, values),
        "state": normal(batch, values, key, value),
    }
    there = {"g": decay != "none", "beta": delta}
    x = {name: value for name, value in x.items() if there.get(name, True)}
    return {"value_g" if name == "g" and decay == "value" else name: value for name, value in x.items()}


def documents(length: int) -> Tensor:
    """Row 0: many short documents, some of one token; row 1: three long ones and padding."""
    short = torch.randint(0, 2, (length,), generator=torch.Generator().manual_seed(0)).cumsum(0)
    long = torch.arange(length) * 3 // length
    long[max(length - 5, 1) :] = -1
    return torch.stack([short, long])


def apply(rule, x: dict[str, Tensor], documents_BT: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    five = [x.get(name) for name in NAMES[:5]]
    options |= {"value_g_BTJV": x["value_g"]} if "value_g" in x else {}
    return rule(*five, scale=0.7, documents_BT=documents_BT, state_BJKV=x.get("state"), **options)


def results(rule, x: dict[str, Tensor], documents_BT: Tensor | None, **options) -> list[Tensor]:
    """Outputs (zero at padding), last state, and the gradients of a random function of both."""
    x = {name: value.detach().clone().requires_grad_() for name, value in x.items()}
    out, state = apply(rule, x, documents_BT, **options)
    if documents_BT is not None:
        out = out * (documents_BT >= 0)[..., None, None]
    generator = torch.Generator().manual_seed(7)
    total = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in (out, state))
    return [out.detach(), state.detach(), *torch.autograd.grad(total, list(x.values()))]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("strength", [0.3, 50.0], ids=["weak", "strong"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
def test_chunked_equals_recurrent(length: int, packed: bool, strength: float, kind: str) -> None:
    x, ids = operands(length, strength, kind=kind), documents(length) if packed else None
    for ours, reference in zip(results(chunked, x, ids), results(recurrent, x, ids), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_any_chunk_length_gives_the_same(chunk: int, kind: str) -> None:
    x, ids = operands(17, kind=kind), documents(17)
    for ours, reference in zip(results(chunked, x, ids, chunk=chunk), results(recurrent, x, ids), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", RULES)
def test_recurrent_is_the_equation(kind: str) -> None:
    x = operands(6, kind=kind)
    out, last = apply(recurrent, x)
    eye = torch.eye(5, dtype=torch.float64)
    for b in range(2):
        for j in range(4):
            state = x["state"][b, j]
            for t in range(6):
                k, v = x["k"][b, t, j // 2], x["v"][b, t, j]
                kept = torch.diag(x["g"][b, t, j].exp().expand(5)) @ state if "g" in x else state
                kept = kept @ torch.diag(x["value_g"][b, t, j].exp()) if "value_g" in x else kept
                if "beta" in x:
                    beta = x["beta"][b, t, j]
                    kept, v = (eye - beta * torch.outer(k, k)) @ kept, beta * v
                state = kept + torch.outer(k, v)
                torch.testing.assert_close(out[b, t, j], 0.7 * state.T @ x["q"][b, t, j // 2])
            torch.testing.assert_close(last[b, j], state)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("rule", [recurrent, chunked])
def test_documents_are_as_if_alone_and_padding_leaves_the_state(rule, kind: str) -> None:
    x = operands(20, batch=1, kind=kind)
    ids = torch.tensor([[4] * 7 + [2] * 1 + [4] * 9 + [-1] * 3])
    out, state = apply(rule, x, ids)
    start, alone = 0, None
    for length in (7, 1, 9):
        piece = {name: value[:, start : start + length] for name, value in x.items() if name != "state"}
        if start == 0:
            piece["state"] = x["state"]
        expected, alone = apply(recurrent, piece)
        torch.testing.assert_close(out[:, start : start + length], expected, rtol=1e-12, atol=1e-12)
        start += length
    torch.testing.assert_close(state, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["gated linear attention", "gated slots", "gated delta rule", "kimi delta rule"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_finite_under_the_strongest_gates(dtype: torch.dtype, kind: str) -> None:
    x = {name: value.to(dtype) for name, value in operands(130, 50.0, kind=kind).items()}
    x["value_g" if "value_g" in x else "g"][:, ::7] = 0
    x = {name: value.requires_grad_() for name, value in x.items()}
    out, state = apply(chunked, x, documents(130))
    assert out.dtype == dtype and state.dtype == torch.float32
    gradients = torch.autograd.grad(out.float().sum() + state.sum(), list(x.values()))
    assert all(y.isfinite().all() for y in (out, state, *gradients))
    wide = {name: value.detach().double() for name, value in x.items()}
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(state.double(), apply(recurrent, wide, documents(130))[1], rtol=close, atol=close)


def test_repeated_keys_in_single_precision() -> None:
    """A page of one token: the terms of a Neumann series would reach 1e17 and cancel."""
    x = {name: value[:1] for name, value in operands(64, 0.0).items()}
    x["k"] = x["k"][:, :1].expand(-1, 64, -1, -1)
    x["beta"] = torch.ones_like(x["beta"])
    single = {name: value.float() for name, value in x.items()}
    torch.testing.assert_close(apply(chunked, single)[0].double(), apply(recurrent, x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_unit_inverse_and_its_gradient(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    strict = torch.randn(2, size, size, generator=generator, dtype=torch.float64).div(size).tril(-1).requires_grad_()
    cotangent = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    ours, reference = unit_inverse(strict), torch.linalg.inv(torch.eye(size, dtype=torch.float64) + strict)
    torch.testing.assert_close(ours, reference)
    gradients = [torch.autograd.grad((y * cotangent).sum(), strict)[0] for y in (ours, reference)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["retention", "gated linear attention", "kimi delta rule"])
def test_long_sequences_in_single_precision(kind: str) -> None:
    """Errors do not pile up over 8192 tokens, behind gates that are open, half open and shut."""
    x = {name: value[:1] for name, value in operands(8192, 1.0, kind=kind).items()}
    x["g"] = x["g"] ** 5 * 50
    single = {name: value.float() for name, value in x.items()}
    for ours, reference in zip(apply(chunked, single), apply(recurrent, x), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4)
