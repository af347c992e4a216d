"""How fast this machine multiplies matrices: what model FLOPs utilisation is measured against."""

import time

import torch

ROUNDS = 3
# Times bfloat16's speed from which float32 is worth a try: machines move by a tenth or two from round to round.
NOTABLY = 1.25


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


def faster_in_float32(device: str, dtype: torch.dtype, peak: float) -> str | None:
    """A sentence where this machine multiplies float32 notably faster than `dtype`, whose peak is given: bfloat16 on
    processors without units for it."""
    if device != "cpu" or dtype != torch.bfloat16:
        return None
    ratio = matmul_peak(device, torch.float32) / peak
    if ratio < NOTABLY:
        return None
    return (
        f"this machine multiplies matrices {ratio:.1f} times as fast in float32 as in bfloat16; "
        "train.dtype=float32 is likely faster here, at twice the memory for activations"
    )


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """The most bytes that this process has held: of GPU memory, or of main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
