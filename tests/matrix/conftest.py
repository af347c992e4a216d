"""Where the sweep writes down what became of its cells."""

import os
from pathlib import Path

import pytest

from tests.matrix.code import Versions
from tests.matrix.records import Book


@pytest.fixture(scope="session")
def book() -> Book | None:
    """The records in the folder that WEFT_RECORDS names; None without one."""
    folder = os.environ.get("WEFT_RECORDS")
    return Book(Path(folder), Versions()) if folder else None
