"""The fixture `site`: a daemon and a gateway, as processes on free ports."""

from collections.abc import Iterator

import pytest

from regd_client import blocking
from tests.gateways.consumers import Site
from tests.gateways.test_serve import port_of, serving
from tests.support.daemon import DaemonProcess


@pytest.fixture
def site(process: DaemonProcess) -> Iterator[Site]:
    with serving("--http", "0", "--dns", "0", address=process.addresses[0]) as running:
        lines = running.lines(4)
        with blocking.Client(process.addresses[0]) as client:
            yield Site(client, port_of(lines[0]), port_of(lines[2]))
