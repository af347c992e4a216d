"""Numbers that a config may hold: checks that plug-in configs share, each one sentence with the value and the rule."""

import math

# As many as float64 bytes fit in 63 bits: torch computes the size of a tensor in signed 64-bit bytes.
MOST_ELEMENTS = 2**60


def at_least(config: object, minimum: float, *names: str, hint: str = "") -> None:
    """Raise ValueError for the first of the named fields that is smaller; null passes. hint: the way out."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}{hint}")


def above_zero(config: object, *names: str, hint: str = "") -> None:
    """Raise ValueError for the first of the named fields that is 0 or less; null passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0{hint}")


def check_size(what: str, *sizes: int) -> None:
    """Raise ValueError where a tensor of these sizes cannot be, whatever the memory."""
    if math.prod(sizes) >= MOST_ELEMENTS:
        # Python writes no decimals of a whole number that is too long.
        shape = " x ".join(str(size) if size < 2**64 else f"2**{size.bit_length() - 1}" for size in sizes)
        raise ValueError(f"{what} {shape} is too large, a tensor holds fewer than 2**60 elements; use smaller sizes")


def shared_out(num_heads: int, num_kv_heads: int | None) -> None:
    """Raise ValueError unless each key/value head serves the same number of query heads."""
    if num_heads % (num_kv_heads or num_heads):
        raise ValueError(f"num_heads {num_heads} is not a positive multiple of num_kv_heads {num_kv_heads}; change one")


def head_width(d_model: int, num_heads: int, head_dim: int | None) -> int:
    """head_dim where given, and otherwise d_model / num_heads. Raises ValueError where that is no whole number."""
    if head_dim is None and d_model % num_heads:
        raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}; give head_dim, or change one")
    return head_dim or d_model // num_heads
