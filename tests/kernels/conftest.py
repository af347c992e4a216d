"""Kernels at awkward sizes, in one block and in many of a few rows."""

import pytest

from models.kernels import blocks


@pytest.fixture(params=[blocks.ELEMENTS, 40], ids=["whole", "blocks"])
def blocked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ELEMENTS", request.param)
