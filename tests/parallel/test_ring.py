"""Attention round a ring against attention to all keys with a mask, and how stretches of a sequence lie over ranks."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from models.kernels.attention import as_bias, as_gated_bias, partial, visibility
from models.kernels.attention.by_blocks import by_head, by_token, scores
from parallel.mesh import Mesh, MeshConfig
from parallel.ring import order
from parallel.sequence import RankSequence
from parallel.testing import Pool

HEADS, KEY_HEADS, KEY, VALUE = 6, 2, 4, 3
# Sums of at most 96 products in another order; bfloat16 rounds scores, outputs and weights to 2^-9 of themselves.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 6e-2}


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, gates of the keys, and cotangents of the output and of the log of sums."""
    generator = torch.Generator().manual_seed(length)
    sizes = [(HEADS, KEY), (KEY_HEADS, KEY), (KEY_HEADS, VALUE), (), (HEADS, VALUE), (HEADS,)]
    made = [torch.randn(2, length, *size, generator=generator) for size in sizes]
    gate = made[3].sigmoid() * (made[3] > -0.8)
    return [x.to(dtype) for x in (*made[:3], gate, *made[4:])]


def places(length: int, packed: bool) -> tuple[Tensor, Tensor | None]:
    """Positions, and documents of 1, 7, 20, ... tokens before padding."""
    index_BT = torch.arange(length).expand(2, -1)
    if not packed:
        return index_BT, None
    starts = torch.tensor([0, 1, 8, 28, 50])
    document_BT = (index_BT[..., None] >= starts).sum(-1) - 1
    return index_BT - starts[document_BT], document_BT.masked_fill(index_BT >= length - 3, -1)


def reference(length: int, packed: bool, window: int | None, gated: bool) -> list[Tensor]:
    """Output, log of sums, and the gradients of q, k, v and the gates, of the whole sequence in float64."""
    q, k, v, gate, cotangent, cotangent_lse = inputs(length, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, gate)]
    positions_BT, documents_BT = places(length, packed)
    ids_BT = torch.zeros_like(positions_BT) if documents_BT is None else documents_BT
    seen = visibility(positions_BT, ids_BT, positions_BT, ids_BT, window)
    bias = as_bias(seen, q.dtype)
    if gated:
        bias = as_gated_bias(seen, positions_BT[:, :, None] - positions_BT[:, None], gate, q.dtype)
    score = scores(by_head(q, KEY_HEADS), k.transpose(1, 2)) + bias[:, None, None]
    out = by_token((score.softmax(-1).flatten(2, 3) @ v.transpose(1, 2)).unflatten(2, score.shape[2:4]))
    lse = by_token(score.logsumexp(-1, keepdim=True))[..., 0]
    loss = (out * cotangent).sum() + (lse * cotangent_lse).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def ring(length: int, dtype: torch.dtype, packed: bool, window: int | None, gated: bool, ranks: int) -> list[Tensor]:
    """The same, of this rank's tokens."""
    cp = Mesh(MeshConfig(cp=ranks, context="ring")).cp
    places_T = order(length, ranks, torch.device("cpu"))
    mine = places_T.chunk(ranks)[cp.index]
    own = [x[:, mine] for x in inputs(length, dtype)]
    leaves = [x.requires_grad_() for x in own[:4]]
    positions_BT, documents_BT = (None if x is None else x[:, places_T] for x in places(length, packed))
    assert positions_BT is not None
    gate = leaves[3] if gated else None
    q, k, v, _ = leaves
    out, lse = RankSequence(cp).attend(q, k, v, gate, positions_BT, documents_BT, window)
    assert out.dtype == dtype
    loss = (out * own[4]).sum() + (lse * own[5]).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def worst(length: int, dtype: torch.dtype, packed: bool, window: int | None, gated: bool, ranks: int) -> list[float]:
    mine = order(length, ranks, torch.device("cpu")).chunk(ranks)[Mesh(MeshConfig(cp=ranks, context="ring")).cp.index]
    expected = [x[:, mine] for x in reference(length, packed, window, gated)]
    with mock.patch.object(partial, "BLOCK", 16):
        got = ring(length, dtype, packed, window, gated, ranks)
    return [
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(got, expected, strict=True)
    ]


CASES = [
    (4, torch.float64, False, None, False, 2),
    (12, torch.float64, True, None, True, 3),
    (72, torch.float64, True, None, False, 2),
    (72, torch.float64, True, 5, True, 3),
    (80, torch.float64, False, 7, False, 4),
    (96, torch.float64, False, None, True, 4),
    (96, torch.float32, True, None, True, 2),
    (96, torch.bfloat16, False, None, False, 2),
]


@pytest.mark.parametrize(("length", "dtype", "packed", "window", "gated", "ranks"), CASES, ids=str)
def test_a_ring_is_attention_to_all_keys(
    length: int, dtype: torch.dtype, packed: bool, window: int | None, gated: bool, ranks: int, pool: Pool
) -> None:
    """Output, log of sums and the gradients of queries, keys, values and gates, on every rank."""
    for errors in pool.run(worst, ranks, length, dtype, packed, window, gated, ranks):
        assert max(errors) < TOLERANCE[dtype], errors


def stretches_of(length: int, width: int, ranks: int) -> bool:
    """Whether this rank finds what is in front of its stretches, and what others have."""
    cp = Mesh(MeshConfig(cp=ranks, context="ring")).cp
    group, whole_BT = RankSequence(cp), torch.arange(1, 1 + 2 * length).view(2, length)
    x_BT = whole_BT[:, order(length, ranks, torch.device("cpu"))].chunk(ranks, 1)[cp.index]
    rows_RC = group.rows(x_BT)
    padded = torch.cat([torch.full((2, width), -1), whole_BT], 1)
    starts = rows_RC.view(2, -1, rows_RC.shape[1])[..., 0] - whole_BT[:, :1]
    expected = torch.stack([padded[b, s : s + width] for b in range(2) for s in starts[b].tolist()])
    everyone_SB = group.everyone(rows_RC[:, 0])
    return (
        torch.equal(group.joined(rows_RC), x_BT)
        and torch.equal(group.before(rows_RC, width, -1), expected)
        and torch.equal(everyone_SB.T, whole_BT[:, :: length // (2 * ranks)])
        and torch.equal(group.own(everyone_SB), rows_RC[:, 0])
    )


@pytest.mark.parametrize(("length", "width", "ranks"), [(8, 3, 4), (12, 3, 3), (16, 1, 2), (16, 6, 4), (24, 3, 2)])
def test_stretches(length: int, width: int, ranks: int, pool: Pool) -> None:
    """Shorter and longer than what a convolution sees."""
    assert all(pool.run(stretches_of, ranks, length, width, ranks))


def test_all_ranks_have_the_same_work() -> None:
    """Pairs of a query and a key that it sees, under a causal mask."""
    ranks, length = 4, 64
    for places_T in order(length, ranks, torch.device("cpu")).chunk(ranks):
        assert int((places_T + 1).sum()) == length * (length + 1) // 2 // ranks
