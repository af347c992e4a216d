"""Places in queues by sorting, in plain torch.

Shape suffixes: R rows, M items of a row, Q queues of a row.
"""

import torch
from torch import Tensor


def queues(queue_RM: Tensor, num_queues: int) -> tuple[Tensor, Tensor]:
    """(place [R, M]: how many of the same queue come before in the row; counts [R, Q] of each queue), int64.

    Every row has queues of its own. An item of queue -1 stands in none: its place is -1.
    """
    order_RM = queue_RM.argsort(dim=1, stable=True)
    sorted_RM = queue_RM.gather(1, order_RM)
    # Unlike bincount it does not wait for the device.
    ids_RQ = torch.arange(num_queues, device=queue_RM.device).expand(len(queue_RM), -1).contiguous()
    ends_RQ = torch.searchsorted(sorted_RM, ids_RQ, right=True)
    starts_RQ = torch.searchsorted(sorted_RM, ids_RQ)
    numbers_M = torch.arange(queue_RM.shape[1], device=queue_RM.device)
    place_RM = (numbers_M - starts_RQ.gather(1, sorted_RM.clamp_min(0))).masked_fill(sorted_RM < 0, -1)
    return torch.empty_like(place_RM).scatter(1, order_RM, place_RM), ends_RQ - starts_RQ
