"""One pool of gloo processes for the whole run."""

from collections.abc import Iterator

import pytest

from parallel.testing import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with Pool(8) as pool:
        yield pool
