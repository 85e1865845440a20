"""The short form of the siege: the same scenarios with fewer connections."""

import asyncio
import os
import resource
from pathlib import Path

import pytest

from tests.long.siege import EXPECTED, SCENARIOS, Scenario, besiege, full_house
from tests.support.daemon import WAIT_S, DaemonProcess, InLoop

LOG_LINES_MAX = 6  # the start, the stop, and one line in 10 s about other protocols
SERVED_MS_MAX = 5_000.0  # far above the usual values, for a busy machine
RSS_LEFT_MIB_MAX = 24.0  # what the allocator may keep
RSS_MOST_MIB_MAX = {
    "endless_lines": 112.0
}  # above the value before: `input_bytes_total_max`, and the same again for handling


class Few(DaemonProcess):
    """A daemon with a low limit of open files, and so of connections."""

    FILES = 1_000

    def command(self, *flags: str) -> list[str]:
        python, option, start, *others = super().command(*flags)
        few = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({self.FILES}, {self.FILES})); "
        return [python, option, few + start, *others]


@pytest.mark.sample(8)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.name)
def test_siege(tmp_path: Path, scenario: Scenario) -> None:
    kind = DaemonProcess
    if scenario.needs_root and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if scenario.attack is full_house:
        kind = Few
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < Few.FILES:
            pytest.skip("so few files may be open here that a full house is too small")
    with kind(tmp_path / "registry.json", "--log-level", "warning") as daemon:
        figures = besiege(daemon, scenario, scenario.few, hold_s=0.1, calm_s=0.1)
    assert figures.names == EXPECTED
    assert len(figures.log.splitlines()) <= LOG_LINES_MAX, figures.log
    assert "Traceback" not in figures.log
    assert any(what == "ask" for _, what, _ in figures.calm + figures.under)
    assert not figures.refused() or scenario.attack is full_house
    assert max(ms for _, _, ms in figures.under + figures.calm) < SERVED_MS_MAX
    before, most, after = figures.rss
    assert most - before < RSS_MOST_MIB_MAX.get(scenario.name, 48.0)
    if scenario.name not in RSS_MOST_MIB_MAX:  # the allocator reuses what it keeps
        assert after - before < RSS_LEFT_MIB_MAX


async def test_input_of_a_peer_that_does_not_read_is_bounded(daemon: InLoop) -> None:
    """Five megabytes of the shortest requests. Split into lines they would take twelve times the memory."""
    deaf = await daemon.peer()
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
    deaf.send(b"help\n" * 1_000_000)
    try:
        async with asyncio.timeout(WAIT_S):
            while not daemon.server.unsent_bytes:
                await asyncio.sleep(0)
        for _ in range(300):
            await asyncio.sleep(0)
            assert daemon.server.waiting_bytes < 8_000_000
    finally:
        deaf.writer.transport.abort()
