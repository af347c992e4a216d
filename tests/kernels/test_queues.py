"""Places in queues: Triton's kernels, interpreted, and plain torch against counting by hand."""

from collections import Counter

import pytest
import torch

from tests.kernels.interpreted import implementation, poisoned


# One block and several, of which the last is full or not; queues in one go and in several; nobody; one queue.
@pytest.mark.parametrize(
    ("rows", "items", "queues"), [(1, 7, 3), (2, 128, 5), (3, 300, 65), (1, 257, 64), (2, 0, 4), (0, 5, 4), (1, 140, 1)]
)
@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("first", [-1, 0], ids=["some in none", "all"])
def test_counts_those_before(name: str, rows: int, items: int, queues: int, first: int) -> None:
    queue_RM = torch.randint(first, queues, (rows, items), generator=torch.Generator().manual_seed(0))
    with poisoned():
        place_RM, counts_RQ = implementation("queues", name)(queue_RM, queues)
    assert place_RM.dtype == counts_RQ.dtype == torch.int64
    assert place_RM.shape == (rows, items) and counts_RQ.shape == (rows, queues)
    for row, places, counts in zip(queue_RM.tolist(), place_RM.tolist(), counts_RQ.tolist(), strict=True):
        seen = Counter[int]()
        for queue, place in zip(row, places, strict=True):
            assert place == (seen[queue] if queue >= 0 else -1)
            seen[queue] += 1
        assert counts == [seen[queue] for queue in range(queues)]


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("queue", [-1, 0, 6])
def test_all_in_one(name: str, queue: int) -> None:
    """Queues that nobody stands in, before and behind."""
    place_RM, counts_RQ = implementation("queues", name)(torch.full((1, 200), queue), 7)
    assert place_RM[0].tolist() == (list(range(200)) if queue >= 0 else [-1] * 200)
    assert counts_RQ[0].tolist() == [200 * (number == queue) for number in range(7)]


def test_strides() -> None:
    queue_MR = torch.randint(-1, 4, (150, 3), generator=torch.Generator().manual_seed(0))
    ours, reference = (implementation("queues", name)(queue_MR.mT, 4) for name in ("triton", "reference"))
    for found, expected in zip(ours, reference, strict=True):
        assert torch.equal(found, expected)
