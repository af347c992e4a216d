"""Kinds that exist for one test."""

from collections.abc import Iterator

import pytest

from models.plugin import Plugin
from tests.contract.tiny import ALL_SLOTS


@pytest.fixture
def forget() -> Iterator[None]:
    """Kinds that a test makes up are gone after it."""
    # All of them now: a file that the test were the first to import would not register a second time.
    known: list[dict[str, type[Plugin]]] = [slot.kinds() for slot in ALL_SLOTS]
    yield
    for slot, before in zip(ALL_SLOTS, known, strict=True):
        slot.registry.clear()
        slot.registry.update(before)
