"""LSH attention against the softmax over the union of what a token's rounds let it see, written token by token."""

import pytest
import torch
from torch import Tensor

from models.kernels.buckets import attend_sorted, places
from models.lm import LM
from models.mixers.lsh import LSH
from models.params import initialize
from models.state import Side
from tests.contract.tiny import build


def expected(q: Tensor, k: Tensor, v: Tensor, codes: Tensor, documents: Tensor, window: int) -> Tensor:
    """Of one row and head: q, k, v [T, K], codes [T, R]."""
    out = torch.empty_like(v)
    for t in range(len(q)):
        seen: set[int] = set()
        for code in codes.T:
            bucket = [s for s in range(t + 1) if code[s] == code[t] and documents[s] == documents[t]]
            seen |= set(bucket[-window:])
        others = sorted(seen - {t}) or [t]
        weights = (k[others] @ q[t] * q.shape[-1] ** -0.5).softmax(0)
        out[t] = weights @ v[others]
    return out


@pytest.mark.parametrize(
    ("length", "window", "rounds", "count"), [(1, 4, 1, 2), (7, 3, 2, 2), (33, 4, 3, 6), (40, 64, 2, 4)]
)
def test_sorted_attention_is_the_union_of_rounds(length: int, window: int, rounds: int, count: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, v = (torch.randn(2, length, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    k = torch.nn.functional.normalize(q, dim=-1)
    codes = torch.randint(count, (2, length, 3, rounds), generator=generator)
    documents = torch.randint(3, (2, length), generator=generator).sort(1).values - 1
    own, order = places(codes, documents, count)
    inputs = (q.requires_grad_(), k.detach().requires_grad_(), v.requires_grad_())
    found = attend_sorted(*inputs, own, order, None, window)
    q, k, v = inputs
    rows = [
        [expected(q[b, :, h], k[b, :, h], v[b, :, h], codes[b, :, h], documents[b], window) for h in range(3)]
        for b in range(2)
    ]
    whole = torch.stack([torch.stack(heads, dim=1) for heads in rows])
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-13)
    cotangent = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for got, want in zip(*(torch.autograd.grad((x * cotangent).sum(), inputs) for x in (found, whole)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_training_draws_directions_for_each_sequence_and_evaluation_has_one_set() -> None:
    model = LM(build(1, mixer="lsh"))
    initialize(model, 0)
    mixer = model.blocks[0].mixer.branch.mixer
    assert isinstance(mixer, LSH)
    q = torch.randn(1, 50, 4, 4, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    tokens = torch.zeros(2, 50, dtype=torch.int64)
    fixed = mixer.codes(q, Side(tokens, tokens))
    drawn = mixer.codes(q, Side(tokens, tokens, keys=torch.tensor([1, 2])))
    assert torch.equal(fixed[0], fixed[1]) and not torch.equal(drawn[0], drawn[1])
    # Near directions are the same for what is near, and four directions are about equally often the nearest.
    assert torch.equal(mixer.codes(1.001 * q, Side(tokens, tokens)), fixed)
    assert fixed.flatten().bincount(minlength=4).min() > 0.1 * fixed.numel()
