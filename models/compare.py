"""Where two model configs differ in what they compute or in the parameters that they hold, in the config's own keys."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from configs.errors import shown
from configs.structure import to_plain
from models.config import LMConfig

SLOTS = ("residual", "values", "norm", "shortcut", "scaling", "depth")


class Difference(NamedTuple):
    """key: of the left config, dotted, as one would override it. left, right: the two values."""

    key: str
    left: Any
    right: Any

    @property
    def of_slot(self) -> bool:
        """Whether a slot of the model has another kind, and not only one inside a kind."""
        above = self.key.split(".")[:-1]
        return self.key.endswith(".kind") and len(above) == (3 if above[0] == "layers" else 1)


def differences(left: LMConfig, right: LMConfig) -> list[Difference]:
    """Every setting that differs, once, in the order of the config. Empty: weights of one are weights of the other.

    How a config is spelled (its letters, defaults written out) and what only training uses make no difference.
    """
    found: dict[str, Difference] = {}
    for difference in compared(left, right):
        found.setdefault(difference.key, difference)
    return list(found.values())


def compared(left: LMConfig, right: LMConfig) -> Iterator[Difference]:
    for key in ("vocab_size", "d_model", "tie_embeddings"):
        yield from leaves(key, getattr(left, key), getattr(right, key))
    letters = left.pattern * left.repeat
    if len(letters) != len(right.expanded):
        yield Difference("pattern x repeat", f"{len(letters)} layers", f"{len(right.expanded)} layers")
    for slot in SLOTS:
        yield from leaves(slot, spelled(left, getattr(left, slot)), spelled(right, getattr(right, slot)))
    for letter, one, other in zip(letters, left.expanded, right.expanded, strict=False):
        for slot in ("mixer", "ffn"):
            ours, theirs = spelled(left, getattr(one, slot)), spelled(right, getattr(other, slot))
            yield from leaves(f"layers.{letter}.{slot}", ours, theirs)
        ours, theirs = spelled(left, one.norm or left.norm), spelled(right, other.norm or right.norm)
        yield from leaves("norm" if one.norm is None else f"layers.{letter}.norm", ours, theirs)


def said(value: Any) -> str:
    """A value of a difference, for a sentence."""
    return value if isinstance(value, str) else shown(value)


def spelled(config: LMConfig, plugin: Any) -> dict[str, Any]:
    return to_plain(plugin.canonical(config.d_model))


def leaves(key: str, left: Any, right: Any) -> Iterator[Difference]:
    """The leaves that differ; of plug-ins of two kinds the kind alone: their other keys mean nothing together."""
    if not isinstance(left, dict) or not isinstance(right, dict):
        if left != right:
            yield Difference(key, left, right)
    elif left.get("kind") != right.get("kind"):
        yield Difference(f"{key}.kind", left.get("kind"), right.get("kind"))
    else:
        for name in dict.fromkeys([*left, *right]):
            yield from leaves(f"{key}.{name}", left.get(name), right.get(name))
