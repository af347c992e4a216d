"""What crosses the layers of a model: every state entry, who writes and reads it, and what lies at each boundary."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from models.lm import LM, LOSSES
from models.state import Entry, Layout


@dataclasses.dataclass(frozen=True)
class Life:
    """An entry's way through the model. writers, readers: the steps that do, in order, such as layers.0.mixer."""

    entry: Entry
    writers: tuple[str, ...]
    readers: tuple[str, ...]


def steps(model: LM) -> Iterator[tuple[str, tuple[str, ...], tuple[Entry, ...]]]:
    """(name, entries read, entries written) of every step of a whole model, in order."""
    assert model.opener is not None and model.closer is not None
    yield "open", (), model.opener.writes
    for layer in model.blocks:
        for part, (reads, writes) in zip(("depth", "mixer", "ffn"), layer.events(), strict=True):
            yield f"layers.{layer.index}.{part}", reads, writes
    yield "close", model.closer.reads, ()


def lives(model: LM) -> list[Life]:
    """All entries in the order of their first writers, then the losses, which every boundary passes on."""
    entries: dict[str, Entry] = {}
    writers: dict[str, list[str]] = {}
    readers: dict[str, list[str]] = {}
    for step, reads, writes in steps(model):
        for name in dict.fromkeys(reads):
            readers.setdefault(name, []).append(step)
        for entry in writes:
            entries.setdefault(entry.name, entry)
            writers.setdefault(entry.name, []).append(step)
    found = [Life(entry, tuple(writers[name]), tuple(readers.get(name, ()))) for name, entry in entries.items()]
    if adding := tuple(f"layers.{layer.index}" for layer in model.blocks if layer.has_losses):
        found.append(Life(LOSSES, adding, ("loss",)))
    return found


def boundary_bytes(boundary: Sequence[Entry], tokens: int, stream: torch.dtype) -> int:
    """Of one boundary's entries for so many tokens, over all ranks that split them. stream: the stream's type."""
    return sum(
        math.prod(entry.shape) * (1 if entry.layout is Layout.PER_RANK else tokens) * entry.dtype_in(stream).itemsize
        for entry in boundary
    )
