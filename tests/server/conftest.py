"""Fixture for the tests of the resolve cache: a daemon with the cache and a daemon without."""

from collections.abc import Iterator

import pytest

from tests.support.twins import Twins, line, system


@pytest.fixture
def twins() -> Iterator[Twins]:
    with system():
        twins = Twins()
        twins.write(line("register", name="db", port=1))
        yield twins
        twins.close()
