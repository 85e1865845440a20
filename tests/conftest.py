"""Fixtures for all tests: the event loop, and a daemon in that loop or in its own process. Selects the short form."""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

from regd_client import registrar
from tests.support.daemon import DaemonProcess, InLoop
from tests.support.length import LONG, examples
from tests.support.polling import block_until

collect_ignore = ["sample"]  # a project of its own, which system/test_sample.py runs
os.environ.pop("REGD_AUTOSTART", None)  # no test starts a daemon of whoever runs the tests
settings.register_profile("regd", max_examples=examples(100), deadline=None, print_blob=True)
settings.load_profile("regd")  # no deadline: on a busy machine any example may take a second


def pytest_configure(config: pytest.Config) -> None:
    """Run event loops in debug mode in the long form. It doubles the time that tests in one process take."""
    config.option.asyncio_debug = LONG


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the short form unless REGD_TEST_LONG=1. On uvloop, that is a quarter of what it is on asyncio's loop."""
    if LONG:
        return
    cases: Counter[str] = Counter()

    def is_selected(item: pytest.Item) -> bool:
        sample = item.get_closest_marker("sample")
        if sample is None:
            return item.get_closest_marker("long") is None
        function = item.nodeid.partition("[")[0]
        cases[function] += 1
        return cases[function] % int(sample.args[0]) == 1

    selected = [item for item in items if is_selected(item)]
    if os.environ.get("REGD_TEST_LOOP") == "uvloop":
        selected = selected[::4]
    if len(selected) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(selected)])
        items[:] = selected


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run on asyncio's own loop, or with REGD_TEST_LOOP=uvloop on uvloop's."""
    name = os.environ.get("REGD_TEST_LOOP", "asyncio")
    if name == "uvloop":
        import uvloop

        return {name: uvloop.new_event_loop}
    assert name == "asyncio", f"REGD_TEST_LOOP={name}: asyncio or uvloop"
    return {name: asyncio.new_event_loop}


@pytest.fixture(autouse=True)
def no_client_goes_on() -> Iterator[None]:
    """Fail a test that leaves a client at work, in a thread: it would disturb the tests after it."""
    yield
    block_until(lambda: not registrar._TASKS and not registrar._LINGERING)


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[InLoop]:
    """A daemon in the test's own loop, on a free port, with time moved by hand."""
    async with InLoop(tmp_path / "registry.json") as running:
        yield running


@pytest.fixture
def process(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon in a process of its own, started."""
    with DaemonProcess(tmp_path / "registry.json") as running:
        running.start()
        yield running
