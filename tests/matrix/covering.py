"""A covering array: models in which any two kinds of different slots that may meet do meet, in few models."""

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from models.config import LMConfig
from models.ffn.routing import RouterConfig
from models.lm import LM
from models.rules import reasons
from tests.contract.tiny import SLOTS, build, diverges, limited_router, plain

Choice = tuple[str, str]  # (slot, kind); of an FFN with a router ("ffn", "moe/switch")
Choices = tuple[Choice, ...]  # of different slots, in their order


def cover(factors: Mapping[str, Sequence[str]], apart: Mapping[Choices, str]) -> list[Choices]:
    """Models that hold every pair of kinds but those that are `apart`.

    Each begins with the first pair that no model has yet, and takes, slot by slot, of the kinds that may meet those
    it has, the one that brings most new pairs; of equals the one that was taken least. factors: slot to its kinds.
    apart: pairs, and threes, that may not meet.
    """
    slots = list(factors)
    missing = dict.fromkeys(pair for pair in every_pair(factors) if pair not in apart)
    used: Counter[Choice] = Counter()
    found = []

    def joined(choice: Choice, others: Iterable[Choice]) -> Choices:
        return tuple(sorted((choice, *others), key=lambda each: slots.index(each[0])))

    while missing:
        model = dict(next(iter(missing)))
        for slot in sorted(slots, key=lambda slot: -len(factors[slot])):
            if slot in model:
                continue
            choices = [(slot, kind) for kind in factors[slot]]
            others = [some for size in (1, 2) for some in itertools.combinations(model.items(), size)]
            met = {choice: [joined(choice, some) for some in others] for choice in choices}
            free = [choice for choice in choices if apart.keys().isdisjoint(met[choice])]
            new = {choice: sum(each in missing for each in met[choice]) for choice in free}
            model[slot] = max(free, key=lambda choice, new=new: (new[choice], -used[choice]))[1]
        row = tuple((slot, model[slot]) for slot in slots)
        used.update(row)
        for each in itertools.combinations(row, 2):
            missing.pop(each, None)
        found.append(row)
    return found


def every_pair(factors: Mapping[str, Sequence[str]]) -> list[Choices]:
    return [
        ((slot, kind), (other, another))
        for slot, other in itertools.combinations(factors, 2)
        for kind in factors[slot]
        for another in factors[other]
    ]


def kinds() -> dict[str, list[str]]:
    """Slot to its kinds. An FFN whose router can be chosen is there once with each."""
    found = {slot.slot: list(slot.kinds()) for slot in SLOTS}
    routed = [kind for kind in found["ffn"] if "router" in plain("ffn", kind)]
    found["ffn"] = [kind for kind in found["ffn"] if kind not in routed]
    found["ffn"] += [f"{kind}/{router}" for kind in routed for router in RouterConfig.kinds()]
    return found


def config_of(choices: Choices) -> LMConfig:
    """Four layers with these kinds, and the usual ones in other slots."""
    fields: dict[str, Any] = dict(choices)
    ffn, _, router = dict(choices).get("ffn", "swiglu").partition("/")
    fields["ffn"] = limited_router(router, ffn) if router else ffn
    return build(**fields)


@functools.cache
def refusal(choices: Choices, whole: bool) -> str:
    """Why these kinds may not meet, empty where they may. whole: by the model itself too, which takes a hundred times
    as long as the rules."""
    config = config_of(choices)
    reason = next(reasons(config), "") or diverges(dict(choices))
    if reason or not whole:
        return reason
    try:
        with torch.device("meta"):
            LM(config)
    except ValueError as error:
        return str(error)
    return ""


def parts_refused(rows: Iterable[Choices], size: int) -> dict[Choices, str]:
    """The parts of so many kinds that are to blame."""
    parts = (part for row in rows for part in itertools.combinations(row, size))
    return {part: reason for part in parts if (reason := refusal(part, whole=True))}


@functools.cache
def array() -> tuple[tuple[Choices, ...], dict[Choices, str]]:
    """The models over all kinds, the same in every process, and the pairs and threes that are refused, each with the
    reason. Takes some ten seconds."""
    factors = kinds()
    apart = {pair: reason for pair in every_pair(factors) if (reason := refusal(pair, whole=False))}
    while True:
        rows = cover(factors, apart)
        refused = [row for row in rows if refusal(row, whole=True)]
        found = parts_refused(refused, 2) or parts_refused(refused, 3)
        assert found or not refused, refused
        if not found:
            return tuple(rows), apart
        apart |= found
