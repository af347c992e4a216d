"""How fast this machine multiplies matrices: what model FLOPs utilisation is measured against."""

import time

import torch

ROUNDS = 3


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """The most FLOPs per second of a few large products, with this process's threads or its GPU."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(ROUNDS + 1):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def numbers_peak(device: str, dtype: torch.dtype) -> float:
    """`matmul_peak` of numbers of this type: on a CPU bfloat16's, in float32 if that is faster."""
    either = device == "cpu" and dtype == torch.bfloat16
    return max(matmul_peak(device, one) for one in ((dtype, torch.float32) if either else (dtype,)))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """The most bytes that this process has held: of GPU memory, or of main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
